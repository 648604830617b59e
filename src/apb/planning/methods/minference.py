"""MInference (arXiv 2407.02490): the vertical-slash pattern."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ..options import Share, option, tokens_of
from .base import Method
from .ring import Ring

if TYPE_CHECKING:
    from ..plan import Plan

# Columns and diagonals of MInference's published configurations.
DEFAULT_VERTICAL = 1000
DEFAULT_SLASH = 6096


@dataclass(frozen=True)
class MInference(Method):
    """Every head sees the columns and diagonals that the last query rows weight most, on one device."""

    name: ClassVar[str] = "minference"
    implementation: ClassVar[str] = "apb.strategies.minference:MInference"
    uses_ranks: ClassVar[bool] = False

    vertical_size: int | float | None = option(
        None, "Columns that each head sees under minference: a number, or a share such as 0.1.", kind=Share
    )
    slash_size: int | float | None = option(
        None, "Diagonals that each head sees under minference: a number, or a share such as 0.1.", kind=Share
    )

    def settled(self, prefix: int, document: int, query: int, ranks: int) -> Self:
        """See :meth:`Method.settled`: both budgets in tokens, at most the whole prompt."""
        total = prefix + document + query
        return replace(
            self,
            vertical_size=tokens_of("vertical size", self.vertical_size, DEFAULT_VERTICAL, total),
            slash_size=tokens_of("slash size", self.slash_size, DEFAULT_SLASH, total),
        )

    @property
    def budgets(self) -> tuple[int, int]:
        """Columns and diagonals that each head sees, of a settled method."""
        assert isinstance(self.vertical_size, int) and isinstance(self.slash_size, int), "settled fills them in"
        return self.vertical_size, self.slash_size

    def is_exact(self, plan: Plan) -> bool:
        """See :meth:`Method.is_exact`: with no column or no diagonal left out, the query's columns included."""
        return max(self.budgets) >= plan.total

    def block_pairs(self, length: int, context: int) -> int:
        """See :meth:`Method.block_pairs`: a row sees as many keys as columns and diagonals together, at most."""
        seen = min(sum(self.budgets), length)
        return seen * (seen + 1) // 2 + (length - seen) * seen

    def lossless(self, blocks: int) -> tuple[str, Method] | None:
        """See :meth:`Method.lossless`."""
        return "all columns", replace(self, vertical_size=1.0, slash_size=1.0)

    def on_ranks(self, ranks: int) -> Method:
        """See :meth:`Method.on_ranks`."""
        return Ring(question_first=self.question_first)
