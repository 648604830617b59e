"""The pairs that blocks see where not all that earlier blocks offer fit into a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.selection import choose


class Contest:
    """The best of the pairs that were offered so far, per KV head, which the next block sees.

    Blocks offer one after the other, and what loses once cannot win later, so a block costs one choice among ``budget``
    pairs and its own, whatever its number. The exception is an edge, whose pairs are seen by the block after theirs
    whatever their scores: of the others the best ``budget`` less the edge are always there.

    Attributes:
        columns: (kv_heads, pairs) int64, columns of the scores, ascending.
        scores: (kv_heads, pairs) fp32, their scores.
        dropped: True once not all that was offered is there.
    """

    def __init__(self, scores: Tensor, budget: int, known: range) -> None:
        """``scores`` (kv_heads, columns) of all pairs; those in the columns ``known`` are there already."""
        self._all, self._budget, self._first = scores, budget, known.start
        self.columns, self.scores = self._of(known)
        self.dropped = False

    def add(self, offers: range, edge: int) -> None:
        """Let the pairs in the next columns compete; the last ``edge`` of them come before all others this once."""
        columns, scores = (
            torch.cat(both, 1) for both in zip((self.columns, self.scores), self._of(offers), strict=True)
        )
        if columns.shape[1] > self._budget:
            order = scores
            if edge:
                order = scores.clone()
                order[:, -edge:] = torch.inf
            best = choose(order, self._budget, order.shape[1], pooled=False)
            columns, scores = columns.gather(1, best), scores.gather(1, best)
            self.dropped = True
        self.columns, self.scores = columns, scores

    def kept(self, each: Tensor) -> Tensor:
        """Of (n, kv_heads, columns, width) the columns before all that compete, and those that are there."""
        if not self.dropped:
            return each
        chosen = each.gather(2, self.columns[None, :, :, None].expand(len(each), -1, -1, each.shape[3]))
        return torch.cat([each[:, :, : self._first], chosen], 2)

    def _of(self, columns: range) -> tuple[Tensor, Tensor]:
        """Columns and their scores, (kv_heads, columns) each."""
        every = torch.arange(columns.start, columns.stop, device=self._all.device)
        return every.expand(len(self._all), -1), self._all[:, columns.start : columns.stop]
