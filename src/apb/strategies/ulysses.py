"""Ulysses (arXiv 2309.14509): heads are scattered and the sequence gathered, by two all-to-alls per layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compressors import Compressor
from ..distributed.collectives import Group
from ..kernels.attention import Segment
from ..layers.base import AttentionInput
from ..planning.methods import kv_heads_of
from ..planning.plan import Plan
from ..timing import timed
from .base import Strategy


class Ulysses(Strategy):
    """Exact. Rank r holds block r of the document, and computes heads/R heads of all of it.

    A rank gets the KV heads that its query heads read: with more ranks than KV heads they are replicated, and where
    its heads straddle groups unevenly, one KV head is sent for every query head.
    """

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        super().__init__(plan, group, compressor, backend)
        self._lengths = [len(plan.block(rank)) for rank in range(plan.ranks)]

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        rank, size = self.group.rank, self.group.size
        rows, heads = self.blocks[0].rows, layer.q.shape[1]
        self.plan.method.check_model(heads, size)
        share = heads // size
        gathered = self._scatter_heads(layer, share)
        kv_heads = (gathered.shape[1] - share) // 2
        q, k, v = gathered.split([share, kv_heads, kv_heads], 1)
        attended = self.attention(layer, q, [Segment(k, v, causal=True)])
        result = layer.settle(*attended, heads=slice(rank * share, (rank + 1) * share)).to(layer.q.dtype)
        mine = (len(self.blocks[0]), share, layer.q.shape[2])
        with timed("communication"):
            out[rows] = torch.cat(self.group.all_to_all(result.split(self._lengths), [mine] * size), 1)

    def _scatter_heads(self, layer: AttentionInput, share: int) -> Tensor:
        """All rows (tokens of the document, share + 2 KV heads, head_dim) of this rank's query heads and KV heads.

        The packed messages to other ranks are freed on return.
        """
        rows, size, group = self.blocks[0].rows, self.group.size, layer.q.shape[1] // layer.k.shape[1]
        wanted = [kv_heads_of(rank * share, share, group) for rank in range(size)]
        width = share + 2 * len(wanted[self.group.rank])
        parts = []
        for rank, kept in enumerate(wanted):
            q = layer.q[rows, rank * share : (rank + 1) * share]
            parts.append(torch.cat((q, layer.k[rows, kept], layer.v[rows, kept]), 1))
        with timed("communication"):
            shapes = [(length, width, layer.q.shape[2]) for length in self._lengths]
            return torch.cat(self.group.all_to_all(parts, shapes))
