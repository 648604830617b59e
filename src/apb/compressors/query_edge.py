"""The query's attention, and the end of the block, so that no sentence is lost at a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..planning.options import option
from .base import BlockView
from .query import Query

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class QueryEdge(Query):
    """As :class:`Query`, but a block's last tokens are passed on before all others.

    A cut between blocks may fall into a sentence. Its second half then stands in a block that does not see the first,
    and the question, which sees both, cannot put together what the layers below kept apart.
    """

    name: ClassVar[str] = "query-edge"

    longest_edge: int = option(32, "Tokens at a block's end that query-edge passes on first, at most.", least=0)

    def score_run(self, run: Sequence[BlockView]) -> Tensor:
        """As :meth:`Query.score_run`, and 2 for edges: a quarter of the passed pairs, up to ``longest_edge`` tokens."""
        scores = super().score_run(run)
        scores[..., scores.shape[-1] - self.edge(run[0].passed) :] = 2.0  # above every share of attention
        return scores

    def edge(self, passed: int) -> int:
        """See :meth:`Compressor.edge`; to blocks after the next an edge is text like any other."""
        return min(self.longest_edge, passed // 4)
