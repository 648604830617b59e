"""Ring attention (arXiv 2310.01889), balanced by an early and a late block on every rank (zigzag)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compressors import Compressor
from ..distributed.collectives import Group
from ..kernels.attention import Segment
from ..kernels.merge import merge_into
from ..layers.base import AttentionInput
from ..planning.plan import Plan
from ..timing import timed
from .base import Strategy


class Ring(Strategy):
    """Exact. Rank r of R holds blocks r and 2R-1-r; keys and values travel round the ring during the computation.

    Every step after the first is balanced over the ranks: the early block of an earlier rank is seen by all rows and
    its late block by none; both blocks of a later rank are seen by the late rows alone. Masked pairs are skipped.
    """

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        super().__init__(plan, group, compressor, backend)
        self._lengths = [[len(block) for block in plan.owned(rank)] for rank in range(plan.ranks)]
        self._width = max(map(sum, self._lengths))

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        rank, size = self.group.rank, self.group.size
        early, late = self.blocks
        rows, split = slice(early.row, late.rows.stop), len(early)
        q = layer.q[rows]
        travelling = layer.k.new_empty(2, self._width, *layer.k.shape[1:])
        travelling[0, : len(q)], travelling[1, : len(q)] = layer.k[rows], layer.v[rows]

        arriving = self.group.shift(travelling)
        merged, lse = self._own_blocks(layer, q, travelling)
        for step in range(1, size):
            with timed("communication"):
                travelling = arriving.wait()
            if step + 1 < size:
                arriving = self.group.shift(travelling)
            source = (rank - step) % size
            if source < rank:
                seen, seen_lse = self.attention(layer, q, self._blocks_of(travelling, source)[:1])
                with timed("attention"):
                    merge_into(merged, lse, seen, seen_lse)
            else:
                seen, seen_lse = self.attention(layer, q[split:], self._blocks_of(travelling, source))
                with timed("attention"):
                    merge_into(merged[split:], lse[:, split:], seen, seen_lse)
        out[rows] = layer.settle(merged, lse)

    def _own_blocks(self, layer: AttentionInput, q: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Rows over this rank's own blocks, in fp32: the early block sees itself, the late one both."""
        early, late = self.blocks
        split = len(early)
        outs, lses = zip(
            self.attention(layer, q[:split], [self.own(layer, early)]),
            self.attention(layer, q[split:], [*self._blocks_of(packed, self.group.rank)[:1], self.own(layer, late)]),
            strict=True,
        )
        return torch.cat([out.float() for out in outs]), torch.cat(lses, 1)

    def _blocks_of(self, travelling: Tensor, source: int) -> list[Segment]:
        """The early and the late block of rank ``source``, in its message (2, width, kv_heads, head_dim)."""
        early, late = self._lengths[source]
        return [
            Segment(travelling[0, :early], travelling[1, :early]),
            Segment(travelling[0, early : early + late], travelling[1, early : early + late]),
        ]
