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
        far: those of the first tokens, in host memory, as :func:`in_place` gives them; None if there are none.
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
        far_k, far_v = (x[start : min(stop, self.away)] for x in self.far)
        return torch.cat([far_k, k]), torch.cat([as_wide(far_v, v), v])

    def chosen(self, picked: Tensor) -> list[Pair]:
        """By KV head keys and values (chosen, 1, head_dim) of the tokens that bool (kv_heads, first tokens) picks."""
        near = _rows((self.k, self.v), picked[:, self.away :])
        if self.far is None:
            return near
        far = _rows(self.far, picked[:, : self.away])
        return [
            (torch.cat([far_k, k]), torch.cat([as_wide(far_v, v), v]))
            for (far_k, far_v), (k, v) in zip(far, near, strict=True)
        ]


def in_place(far: Pair | None, device: torch.device) -> Pair | None:
    """Keys and values in host memory as the device reads them there: tensors of a GPU, if they are pinned for one."""
    if far is None or device.type != "cuda":
        return far
    k, v = (torch.as_tensor(_Pinned(x), device=device).view(x.dtype) for x in far)
    return k, v


class _Pinned:
    """A tensor of pinned host memory for torch to take as one of a GPU, without a copy."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        size = x.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape),
            "strides": tuple(size * stride for stride in x.stride()),
            "typestr": f"<i{size}",  # as numpy has no bf16
            "data": (x.data_ptr(), False),
            "version": 3,
        }


def _rows(pair: Pair, picked: Tensor) -> list[Pair]:
    """By KV head the rows (chosen, 1, head_dim) of the tokens that bool (kv_heads, tokens) picks."""
    k, v = pair
    indices = [(head, each.nonzero().squeeze(1)) for head, each in enumerate(picked)]
    return [(k[index, head : head + 1], v[index, head : head + 1]) for head, index in indices]
