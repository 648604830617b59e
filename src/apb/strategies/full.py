"""Exact attention over the whole prompt on one rank: the reference for all other strategies."""

from __future__ import annotations

from torch import Tensor

from ..layers.base import AttentionInput
from .base import Strategy


class Full(Strategy):
    """One block, seen causally. On several ranks the others hold only the query's rows."""

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        for span in self.blocks:
            out[span.rows] = layer.settle(*self.attention(layer, layer.q[span.rows], [self.own(layer, span)]))
