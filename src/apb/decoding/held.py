"""The keys and values of a layer's shard where they are: the first ones may be in host memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.base import as_wide

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Held:
    """One layer's keys and values, each (tokens, kv_heads, head_dim).

    Attributes:
        far: those of the first tokens, in host memory; None if there are none.
        k, v: those of the tokens after them, on the device.
    """

    far: Pair | None
    k: Tensor
    v: Tensor

    @property
    def away(self) -> int:
        """Number of tokens in host memory."""
        return 0 if self.far is None else len(self.far[0])

    def __len__(self) -> int:
        return self.away + len(self.k)

    def first(self, tokens: int) -> Held:
        """The first tokens, all those in host memory among them."""
        near = tokens - self.away
        return Held(self.far, self.k[:near], self.v[:near])

    def between(self, start: int, stop: int) -> Pair:
        """Keys and values of a run of tokens, on the device."""
        near = slice(max(start - self.away, 0), max(stop - self.away, 0))
        k, v = self.k[near], self.v[near]
        if self.far is None or start >= self.away:
            return k, v
        far_k, far_v = (x[start : min(stop, self.away)].to(k.device) for x in self.far)
        return torch.cat([far_k, k]), torch.cat([as_wide(far_v, v), v])

    def chosen(self, picked: Tensor) -> list[Pair]:
        """By KV head keys and values (chosen, 1, head_dim) of the tokens that bool (kv_heads, first tokens) picks."""
        near = picked[:, self.away :]
        pairs = []
        for head in range(len(picked)):
            index = near[head].nonzero().squeeze(1)
            pairs.append((self.k[index, head : head + 1], self.v[index, head : head + 1]))
        if self.far is None:
            return pairs
        fetched = self._fetched(picked[:, : self.away])
        return [(torch.cat([far[0], k]), torch.cat([far[1], v])) for far, (k, v) in zip(fetched, pairs, strict=True)]

    def _fetched(self, picked: Tensor) -> list[Pair]:
        """Those of :meth:`chosen` that are in host memory: gathered there, and brought to the device in one piece."""
        assert self.far is not None
        indices = [head.nonzero().squeeze(1) for head in picked.cpu()]
        counts = [len(index) for index in indices]
        pinned, parts = self.k.is_cuda, []
        for x, like in zip(self.far, (self.k, self.v), strict=True):
            rows = torch.empty(sum(counts), x.shape[2], dtype=x.dtype, pin_memory=pinned)
            for head, part in enumerate(rows.split(counts)):
                torch.index_select(x[:, head], 0, indices[head], out=part)
            parts.append(as_wide(rows.unsqueeze(1).to(like.device, non_blocking=True), like).split(counts))
        return list(zip(*parts, strict=True))
