"""Ulysses (arXiv 2309.14509): heads are scattered and the sequence gathered, by two all-to-alls a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attention import Segment
from ..methods import check_heads, kv_heads_of
from ..parts import part
from .base import Layer, Strategy


class Ulysses(Strategy):
    """Exact. Rank r holds block r of the document, and computes heads/R heads of all of it.

    A rank gets the KV heads that its query heads read: with more ranks than KV heads they are replicated, and where
    its heads straddle groups unevenly, one KV head is sent for every query head.
    """

    def attend_document(self, layer: Layer, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        size = self.group.size
        span = self.blocks[0]
        heads, kv_heads = layer.q.shape[1], layer.k.shape[1]
        check_heads(self.plan.strategy, heads, size)
        share = heads // size
        wanted = [kv_heads_of(rank * share, share, heads // kv_heads) for rank in range(size)]
        own_kv = len(wanted[self.group.rank])
        width = share + 2 * own_kv
        lengths = [len(self.plan.block(rank)) for rank in range(size)]
        head_dim = layer.q.shape[2]
        parts = []
        for rank, kept in enumerate(wanted):
            pieces = (
                layer.q[span.rows, rank * share : (rank + 1) * share],
                layer.k[span.rows, kept],
                layer.v[span.rows, kept],
            )
            parts.append(torch.cat(pieces, 1))
        with part("communication"):
            gathered = torch.cat(self.group.all_to_all(parts, [(length, width, head_dim) for length in lengths]))
        q, k, v = gathered.split([share, own_kv, own_kv], 1)
        attended = self.attention(layer, q, [Segment(k, v, causal=True)])
        result = layer.settle(*attended, heads=slice(self.group.rank * share, (self.group.rank + 1) * share))
        mine = (len(span), share, head_dim)
        with part("communication"):
            out[span.rows] = torch.cat(self.group.all_to_all(result.split(lengths), [mine] * size), 1)
