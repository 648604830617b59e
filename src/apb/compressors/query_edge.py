"""What the question's rows attend to, and the end of the block, so that no sentence is lost at a cut."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .base import BlockView
from .query import Query

LONGEST_EDGE = 32
"""Tokens at a block's end that are passed on, at most."""


class QueryEdge(Query):
    """As :class:`Query`, but a block's last tokens are passed on before all others.

    A cut between blocks may fall into a sentence. Its second half then stands in a block that does not see the first,
    and the question, which sees both, cannot put together what the layers below kept apart.
    """

    name: ClassVar[str] = "query-edge"

    def score(self, view: BlockView) -> Tensor:
        """As :meth:`Query.score`, and 2 for the edge: a quarter of what is passed, up to ``LONGEST_EDGE`` tokens."""
        scores = super().score(view)
        edge = min(LONGEST_EDGE, view.passed // 4)
        scores[:, scores.shape[1] - edge :] = 2.0  # above every share of attention
        return scores
