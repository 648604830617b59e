"""Copies of a shard in host memory, and their way back to the device: by layer, while the first ones already run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from torch import Tensor

from .cache import ShardCache
from .pinned import HostMemory


class HostCopy:
    """Keys and values of a rank's shard in host memory, which is pinned if they come from a GPU.

    Those of a document do not change: a copy serves until tokens are added that stay.

    Attributes:
        nbytes: bytes of the copy.
    """

    def __init__(self, shard: ShardCache) -> None:
        """Copy all tokens that a shard holds on the device, and wait for that."""
        held = {
            layer: [x.transpose(0, 1) for x in shard.near(layer)] for layer in shard.indices
        }  # (kv_heads, tokens, head_dim)
        sizes = [x.numel() for pair in held.values() for x in pair]
        devices = {x.device for pair in held.values() for x in pair if x.is_cuda}
        self._memory = HostMemory(sum(sizes), held[shard.indices[0]][0].dtype, devices)
        parts = iter(self._memory.numbers.split(sizes))
        self._layers = {layer: [next(parts).view(x.shape) for x in pair] for layer, pair in held.items()}
        for layer, pair in held.items():
            for into, x in zip(self._layers[layer], pair, strict=True):
                _copy(into, x)
        for device in devices:
            torch.cuda.synchronize(device)
        self.nbytes = self._memory.numbers.nbytes

    def replace(self, shard: ShardCache) -> None:
        """Free the device's memory: the copy becomes the storage of the shard that it was made of."""
        for layer, (keys, values) in self._layers.items():
            shard.put(layer, keys.unsqueeze(0), values.unsqueeze(0), None)

    def fetch(self, shard: ShardCache, device_of: Callable[[int], torch.device], room: int) -> None:
        """Give a shard storage on the device again, and start to fill it; whoever uses a layer waits for that layer.

        Args:
            shard: the one that the copy was made of.
            device_of: a layer's device.
            room: tokens that it has room for beyond those of the copy.
        """
        # All memory first: the device must be idle for some kinds of allocation.
        made = {
            layer: [_storage(x, device_of(layer), room if shard.keeps_new else 0) for x in pair]
            for layer, pair in self._layers.items()
        }
        for device in {x.device for pair in made.values() for x in pair if x.is_cuda}:
            # The memory may be in use still by work that is queued.
            _stream(device).wait_stream(torch.cuda.current_stream(device))
        for layer, (keys, values) in made.items():
            pairs = list(zip((keys[0], values[0]), self._layers[layer], strict=True))
            shard.put(layer, keys, values, _on_its_way(pairs))


class Staging:
    """Two pinned buffers through which tensors of files go to a GPU: one is filled while the other is copied."""

    size = 1 << 26

    def __init__(self) -> None:
        self._buffers = [torch.empty(self.size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def to(self, device: torch.device, x: Tensor) -> Tensor:
        """A tensor of the CPU on a GPU; the work that is queued there next sees it whole."""
        out = torch.empty(x.shape, dtype=x.dtype, device=device)
        stream = torch.cuda.current_stream(device)
        pieces = (y.reshape(-1).view(torch.uint8).split(self.size) for y in (out, x.contiguous()))
        for into, piece in zip(*pieces, strict=True):
            copied, buffer = self._copied[self._turn], self._buffers[self._turn][: len(piece)]
            if copied is not None:
                copied.synchronize()
            into.copy_(buffer.copy_(piece), non_blocking=True)
            self._copied[self._turn] = stream.record_event()
            self._turn ^= 1
        return out


def _storage(x: Tensor, device: torch.device, room: int) -> Tensor:
    kv_heads, tokens, head_dim = x.shape
    return torch.empty(1, kv_heads, max(tokens + room, 1), head_dim, dtype=x.dtype, device=device)


def _on_its_way(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Start to copy (into, from) pairs of a layer to their device; what is returned makes later work wait for them.

    On a CPU there is nothing to overlap, and a layer is copied when it is first used.
    """
    device = pairs[0][0].device
    if device.type != "cuda":
        return partial(_copy_all, pairs)
    stream = _stream(device)
    with torch.cuda.stream(stream):
        _copy_all(pairs)
        for into, _ in pairs:
            into.record_stream(stream)  # it may be freed before it is full
        event = stream.record_event()
    return lambda: torch.cuda.current_stream(device).wait_event(event)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which keys and values arrive."""
    return torch.cuda.Stream(device)


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for into, x in pairs:
        _copy(into, x)


def _copy(into: Tensor, x: Tensor) -> None:
    """Copy (kv_heads, tokens, head_dim) to the beginning of a storage of as many heads, head by head.

    A head's tokens are contiguous on both sides, so that no copy is made on the device on the way.
    """
    for mine, theirs in zip(into, x, strict=True):
        mine[: len(theirs)].copy_(theirs, non_blocking=True)
