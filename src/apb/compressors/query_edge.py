"""Attention of the query rows, and the end of the block, so that no sentence is lost at a block boundary."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .base import BlockView
from .query import Query

LONGEST_EDGE = 32
"""Maximum number of tokens at a block's end that are passed on."""


class QueryEdge(Query):
    """:class:`Query`, but a block's last tokens are passed on first.

    A block boundary may split a sentence. Its second half is then in a block that does not see the first, and the
    query, which sees both, cannot recombine what the layers below have read apart.
    """

    name: ClassVar[str] = "query-edge"

    def score(self, view: BlockView) -> Tensor:
        """:meth:`Query.score`, but 2 for the edge: a quarter of the passed tokens, at most ``LONGEST_EDGE``."""
        scores = super().score(view)
        edge = min(LONGEST_EDGE, view.passed // 4)
        scores[:, scores.shape[1] - edge :] = 2.0  # above any attention weight
        return scores
