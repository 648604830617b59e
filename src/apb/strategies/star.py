"""Star Attention (arXiv 2411.17116), first phase: every block sees the first one and itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compressors import Compressor
from ..distributed.collectives import Group
from ..kernels.attention import Segment
from ..layers.base import AttentionInput
from ..planning.plan import Plan
from .base import Strategy, Visible, blocks_visible


class Star(Strategy):
    """The anchor is the beginning of block 0, at its own positions, without the query; nothing is communicated.

    A rank that holds block 0 has the anchor's keys among its own; every other rank computes the anchor's rows anew.
    """

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        super().__init__(plan, group, compressor, backend)
        # The anchor's keys and values of every layer, for the rounds after the first.
        self._kept: dict[int, Segment] = {}

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        anchor = self._anchor_segments(layer)
        for span in self.blocks:
            segments = [self.own(layer, span)] if span.block == 0 else [*anchor, self.own(layer, span)]
            out[span.rows] = layer.settle(*self.attention(layer, layer.q[span.rows], segments))
        if self.anchor:
            attended = self.attention(layer, layer.q[self.anchor.rows], [self.own(layer, self.anchor)])
            out[self.anchor.rows] = layer.settle(*attended)

    def visible(self, layer: AttentionInput) -> Visible:
        """See :meth:`Strategy.visible`: the anchor and the block itself."""
        nothing = torch.empty(0, dtype=torch.int64, device=layer.k.device)
        return blocks_visible(self.plan, lambda block, kv_head: nothing)

    def _anchor_segments(self, layer: AttentionInput) -> list[Segment]:
        """The anchor as this rank's later blocks see it: one segment, or none."""
        if self.itinerary.round:
            segment = self._kept.pop(layer.index, None)
        else:
            holder = self.anchor or next((span for span in self.blocks if span.block == 0), None)
            if holder is None or not self.plan.anchor_length:
                return []
            rows = slice(holder.row, holder.row + self.plan.anchor_length)
            segment = Segment(layer.k[rows], layer.v[rows])
        if segment is None:
            return []
        if not self.itinerary.last:
            # A copy, so that not all keys of the first round live on with the anchor's.
            self._kept[layer.index] = segment if self.itinerary.round else Segment(segment.k.clone(), segment.v.clone())
        return [segment]
