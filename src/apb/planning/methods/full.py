"""Full attention on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Method
from .ring import Ring


@dataclass(frozen=True)
class Full(Method):
    """Exact attention over the whole prompt on one rank: the baseline of all other methods."""

    name: ClassVar[str] = "full"
    implementation: ClassVar[str] = "apb.strategies.full:Full"
    exact: ClassVar[bool] = True
    uses_ranks: ClassVar[bool] = False

    def on_ranks(self, ranks: int) -> Method:
        """See :meth:`Method.on_ranks`."""
        return Ring(question_first=self.question_first)
