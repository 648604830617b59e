"""Star Attention (arXiv 2411.17116), first phase: every block sees the first one and itself."""

from __future__ import annotations

from torch import Tensor

from ..kernels.attention import Segment
from .base import Layer, Strategy


class Star(Strategy):
    """The anchor is the beginning of block 0, at its own positions, without the query; nothing is communicated.

    A rank that holds block 0 has the anchor's keys among its own; every other rank computes the anchor's rows anew.
    """

    def attend_document(self, layer: Layer, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        holder = self.anchor or next((span for span in self.blocks if span.block == 0), None)
        anchor = []
        if holder is not None and self.plan.anchor_length:
            rows = slice(holder.row, holder.row + self.plan.anchor_length)
            anchor = [Segment(layer.k[rows], layer.v[rows])]
        for span in self.blocks:
            segments = [self.own(layer, span)] if span.block == 0 else [*anchor, self.own(layer, span)]
            out[span.rows] = layer.settle(*self.attention(layer, layer.q[span.rows], segments))
        if self.anchor:
            attended = self.attention(layer, layer.q[self.anchor.rows], [self.own(layer, self.anchor)])
            out[self.anchor.rows] = layer.settle(*attended)
