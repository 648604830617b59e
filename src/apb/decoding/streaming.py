"""Keys and values in host memory, brought to the device one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Shard

Pair = tuple[Tensor, Tensor]


@dataclass
class _Buffer:
    """Room on the device for one layer's keys and values.

    Attributes:
        keys, values: (numbers,).
        layer: the layer that is in it, or on its way; None: none.
        far: what that is a copy of.
        arrived: the event after which it is there; None where there is nothing to wait for.
    """

    keys: Tensor
    values: Tensor
    layer: int | None = None
    far: Pair | None = None
    arrived: torch.cuda.Event | None = None

    def holds(self, layer: int, far: Pair) -> bool:
        """True if it is a copy of these keys and values."""
        mine = self.far
        return mine is not None and self.layer == layer and mine[0].shape == far[0].shape

    def fill(self, layer: int, far: Pair) -> None:
        """Queue the copies, head by head: a head's tokens are contiguous on both sides."""
        self.layer, self.far = layer, far
        for into, x in zip(self._views(), far, strict=True):
            for head in range(x.shape[1]):
                into[:, head].copy_(x[:, head], non_blocking=True)

    def pair(self) -> Pair:
        """Keys and values (tokens, kv_heads, head_dim)."""
        keys, values = self._views()
        return keys, values

    def _views(self) -> list[Tensor]:
        assert self.far is not None, "it has been filled"
        views = []
        for numbers, x in zip((self.keys, self.values), self.far, strict=True):
            tokens, kv_heads, head_dim = x.shape
            views.append(numbers[: x.numel()].view(kv_heads, tokens, head_dim).transpose(0, 1))
        return views


class Streaming:
    """Reads a shard's layers that are in host memory through two buffers: one is filled while the other is read.

    The layer after the one that is read is fetched before it is asked for, and after the last one the first.
    """

    def __init__(self, cache: Shard) -> None:
        self._cache = cache
        self._buffers: list[_Buffer] = []
        self._order: list[int] = []
        self._beside: torch.cuda.Stream | None = None

    def fetch(self, layer: int, device: torch.device) -> Pair | None:
        """Keys and values (tokens, kv_heads, head_dim each), on the device, of a layer's tokens in host memory.

        They are there until the next layer but one is fetched. None if the layer has none there.
        """
        far = self._cache.far(layer)
        if far is None:
            return None
        if not self._buffers:
            self._make_buffers(device)
        mine, other = sorted(self._buffers, key=lambda buffer: not buffer.holds(layer, far))
        if not mine.holds(layer, far):
            self._start(mine, layer, far)
        following = self._order[(self._order.index(layer) + 1) % len(self._order)]
        ahead = self._cache.far(following)
        if following != layer and ahead is not None and not other.holds(following, ahead):
            self._start(other, following, ahead)
        if mine.arrived is not None:
            torch.cuda.current_stream(device).wait_event(mine.arrived)
        return mine.pair()

    def _make_buffers(self, device: torch.device) -> None:
        found = {layer: self._cache.far(layer) for layer in self._cache.indices}
        held = {layer: far[0] for layer, far in found.items() if far is not None}
        self._order = list(held)
        most = max(x.numel() for x in held.values())
        numbers = next(iter(held.values()))
        for _ in range(2):
            keys, values = (torch.empty(most, dtype=numbers.dtype, device=device) for _ in range(2))
            self._buffers.append(_Buffer(keys, values))
        if device.type == "cuda":
            self._beside = torch.cuda.Stream(device)

    def _start(self, buffer: _Buffer, layer: int, far: Pair) -> None:
        """Begin to fill a buffer, once the work that is queued, and may read it, is done."""
        if self._beside is None:
            buffer.fill(layer, far)
            return
        self._beside.wait_stream(torch.cuda.current_stream(self._beside.device))
        with torch.cuda.stream(self._beside):
            buffer.fill(layer, far)
            buffer.arrived = self._beside.record_event()
