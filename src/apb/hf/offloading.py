"""Keys and values of a layer's first tokens in host memory, where decode reads them from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .config import expands
from .pinned import HostMemory

if TYPE_CHECKING:
    from .shard_layer import ShardLayer

# A layer moves again once what has come since is this part of what is in host memory: moving copies all of it.
_SINCE = 8


@dataclass(frozen=True)
class Far:
    """A layer's first tokens; they do not change.

    Attributes:
        keys, values: (1, kv_heads, tokens, head_dim each).
        memory: what they are views of.
    """

    keys: Tensor
    values: Tensor
    memory: HostMemory

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.shape[2]

    def first(self, tokens: int) -> Far:
        """The first of them."""
        return replace(self, keys=self.keys[:, :, :tokens], values=self.values[:, :, :tokens])


def check(config: Any, devices: Sequence[torch.device]) -> None:
    """InputError if a model's keys and values cannot be in host memory while it decodes."""
    if expands(config):
        raise InputError(
            f"{config.model_type!r} models expand what the cache holds into keys and values in every pass, which must "
            "be on the device; use a decode method that keeps them there."
        )
    if len(devices) > 1:
        raise InputError(
            f"Keys and values in host memory are read by one GPU of a rank, and its layers are on {len(devices)}; "
            "use one GPU a rank, or a decode method that keeps them there."
        )


def offload(layers: Sequence[ShardLayer], keep: int) -> None:
    """Move the tokens of layers on one device to host memory, but for the last ``keep``, and free their storage."""
    moving = [layer for layer in layers if layer.near - keep > layer.away // _SINCE]
    if not moving:
        return
    storages = [layer.storage for layer in moving]
    devices = {keys.device for keys, _ in storages}
    shapes = [
        [(*x.shape[:2], layer.length - keep, x.shape[3]) for x in pair]
        for layer, pair in zip(moving, storages, strict=True)
    ]
    sizes = [math.prod(shape) for pair in shapes for shape in pair]
    memory = HostMemory(sum(sizes), storages[0][0].dtype, devices)
    parts = iter(memory.numbers.split(sizes))
    del storages  # each is freed as its layer moves
    for layer, pair in zip(moving, shapes, strict=True):
        keys, values = (next(parts).view(shape) for shape in pair)
        layer.move_away(Far(keys, values, memory))
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
