"""A transformers cache that holds one rank's shard, in storage made once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class ShardLayer(CacheLayerMixin):
    """Keys and values of one layer: this rank's part of the prompt, then, on the tail rank, the generated tokens."""

    is_sliding = False

    def __init__(self, shard: ShardCache) -> None:
        super().__init__()
        # Weakly: a cycle would keep gigabytes alive until Python's collector happens to run.
        self._shard: ShardCache = weakref.proxy(shard)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the storage, (1, kv_heads, capacity, head_dim), of the dtype and on the device of the states."""
        capacity = max(self._shard.capacity, 1)
        self.keys = key_states.new_empty(*key_states.shape[:2], capacity, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep what belongs to this shard.

        In prefill the states come back as they are (attention also needs the anchor's, which are not kept); in decode
        the whole shard comes back, with the new tokens at its end where this rank keeps them. A shard that holds
        nothing comes back with one row of no meaning: not all models can work on none. With a slot the new token is
        written there and the whole storage comes back: how much of it counts is known on the device alone.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        kept = self._shard.prefill_rows
        if kept is not None:
            self._append(key_states[:, :, kept], value_states[:, :, kept])
            return key_states, value_states
        if self._shard.slot is not None:
            assert self.keys is not None and self.values is not None, "the cache has not been written yet"
            if self._shard.keeps_new:
                self.keys.index_copy_(2, self._shard.slot, key_states)
                self.values.index_copy_(2, self._shard.slot, value_states)
            return self.keys, self.values
        if self._shard.keeps_new:
            self._append(key_states, value_states)
        return self.view(at_least=1)

    def view(self, at_least: int = 0) -> tuple[Tensor, Tensor]:
        """The filled part: two (1, kv_heads, length, head_dim), of length 0 or ``at_least``."""
        assert self.keys is not None and self.values is not None, "the cache has not been written yet"
        length = max(self.length, at_least)
        return self.keys[:, :, :length], self.values[:, :, :length]

    def _append(self, keys: Tensor, values: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        stop = self.length + keys.shape[2]
        if stop > self.keys.shape[2]:
            grown = max(stop, self.keys.shape[2] + self._shard.growth)
            self.keys, self.values = _grow(self.keys, grown), _grow(self.values, grown)
        self.keys[:, :, self.length : stop] = keys
        self.values[:, :, self.length : stop] = values
        self.length = stop

    def get_seq_length(self) -> int:
        """Tokens of the whole prompt and answer so far, over all ranks: transformers counts positions with it."""
        return self._shard.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Asked only when a mask is built, which this package's attention never needs."""
        return self._shard.total + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class ShardCache(Cache):
    """One rank's shard of all layers.

    Attributes:
        capacity: tokens a layer's storage is made for; it grows by ``growth`` when that is not enough.
        keeps_new: whether this rank keeps the tokens that are generated.
        prefill_rows: which rows of a prefill pass stay; None in decode.
        slot: while a decode step is captured or replayed, the index (1,) on the device where its token is written.
        total: tokens seen so far by all ranks together.
    """

    growth = 256

    def __init__(self, layers: int, *, capacity: int, keeps_new: bool, prefill_rows: slice) -> None:
        self.capacity = capacity
        self.keeps_new = keeps_new
        self.prefill_rows: slice | None = prefill_rows
        self.slot: Tensor | None = None
        self.total = 0
        super().__init__(layers=[ShardLayer(self) for _ in range(layers)])

    @property
    def held(self) -> int:
        """Tokens that this rank holds, of every layer."""
        layer = self.layers[0]
        assert isinstance(layer, ShardLayer)
        return layer.length

    def advance(self) -> None:
        """Count one token more in every layer: it was written to the slot behind the last."""
        for layer in self.layers:
            assert isinstance(layer, ShardLayer)
            layer.length += 1

    def shard(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that this rank holds of a layer: two (tokens, kv_heads, head_dim) views."""
        held = self.layers[layer]
        assert isinstance(held, ShardLayer)
        keys, values = held.view()
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)


def _grow(x: Tensor, capacity: int) -> Tensor:
    grown = torch.empty(*x.shape[:2], capacity, x.shape[3], dtype=x.dtype, device=x.device)
    grown[:, :, : x.shape[2]] = x
    return grown
