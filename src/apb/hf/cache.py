"""A transformers cache that holds one rank's shard, in storage made once, and what stands in for it in decode steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
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
        nothing comes back with one row of no meaning: not all models can work on none.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        kept = self._shard.prefill_rows
        if kept is not None:
            self._append(key_states[:, :, kept], value_states[:, :, kept])
            return key_states, value_states
        if self._shard.keeps_new:
            self._append(key_states, value_states)
        return self.view(at_least=1)

    def view(self, at_least: int = 0) -> tuple[Tensor, Tensor]:
        """The filled part: two (1, kv_heads, length, head_dim), of length 0 or ``at_least``."""
        assert self.keys is not None and self.values is not None, "the cache has not been written yet"
        length = max(self.length, at_least)
        return self.keys[:, :, :length], self.values[:, :, :length]

    def make_room(self, tokens: int) -> None:
        """Have storage for so many tokens more: where there is not, it grows, at the price of a copy."""
        assert self.keys is not None and self.values is not None
        capacity = self.keys.shape[2]
        if self.length + tokens > capacity:
            grown = max(self.length + tokens, capacity + self._shard.growth)
            self.keys, self.values = _grow(self.keys, grown), _grow(self.values, grown)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self.make_room(keys.shape[2])
        assert self.keys is not None and self.values is not None
        stop = self.length + keys.shape[2]
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


@dataclass(frozen=True)
class Layout:
    """What decode steps know of a cache beforehand: caches that are alike in it are stepped by the same graphs.

    Attributes:
        keeps_new: whether the tokens that are generated are kept in it.
        device, dtype: of all keys and values.
        heads: (kv_heads, head_dim) of every layer; None for a layer that has no keys and values.
    """

    keeps_new: bool
    device: torch.device
    dtype: torch.dtype
    heads: tuple[tuple[int, int] | None, ...]


class ShardCache(Cache):
    """One rank's shard of all layers.

    Attributes:
        capacity: tokens a layer's storage is made for; it grows by ``growth`` when that is not enough.
        keeps_new: whether this rank keeps the tokens that are generated.
        prefill_rows: which rows of a prefill pass stay; None in decode.
        total: tokens seen so far by all ranks together.
    """

    growth = 256

    def __init__(self, layers: int, *, capacity: int, keeps_new: bool, prefill_rows: slice) -> None:
        self.capacity = capacity
        self.keeps_new = keeps_new
        self.prefill_rows: slice | None = prefill_rows
        self.total = 0
        super().__init__(layers=[ShardLayer(self) for _ in range(layers)])

    @cached_property
    def layout(self) -> Layout:
        """What kind of cache this is; asked for once it has been written."""
        kept = list(self._kept())
        assert all(x is not None and x.is_contiguous() for layer in kept for x in (layer.keys, layer.values))
        keys = [layer.keys if isinstance(layer, ShardLayer) else None for layer in self.layers]
        first = next(x for x in keys if x is not None)
        heads = tuple(None if x is None else (x.shape[1], x.shape[3]) for x in keys)
        return Layout(self.keeps_new, first.device, first.dtype, heads)

    @property
    def held(self) -> int:
        """Tokens that this rank holds, of every layer."""
        return next(self._kept()).length

    def make_room(self) -> None:
        """Have storage for one token more, where this rank keeps it."""
        first = next(self._kept())
        if self.keeps_new and first.keys is not None and first.length == first.keys.shape[2]:  # as all the others
            for layer in self._kept():
                layer.make_room(1)

    def advance(self) -> None:
        """Count one token more, which was written behind the last one where this rank keeps it."""
        self.total += 1
        if self.keeps_new:
            for layer in self._kept():
                layer.length += 1

    def addresses(self) -> list[tuple[int, int, int]]:
        """Every layer's storage: the addresses of keys and of values, and the capacity; zeros where there is none."""
        places = []
        for layer in self.layers:
            if isinstance(layer, ShardLayer) and layer.keys is not None and layer.values is not None:
                places.append((layer.keys.data_ptr(), layer.values.data_ptr(), layer.keys.shape[2]))
            else:
                places.append((0, 0, 0))
        return places

    def shard(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that this rank holds of a layer: two (tokens, kv_heads, head_dim) views."""
        held = self.layers[layer]
        assert isinstance(held, ShardLayer)
        keys, values = held.view()
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    def _kept(self) -> Iterator[ShardLayer]:
        """The layers that have keys and values."""
        return (layer for layer in self.layers if isinstance(layer, ShardLayer))


def _grow(x: Tensor, capacity: int) -> Tensor:
    grown = torch.empty(*x.shape[:2], capacity, x.shape[3], dtype=x.dtype, device=x.device)
    grown[:, :, : x.shape[2]] = x
    return grown


# Called with a layer's index and a token's keys and values, (1, kv_heads, 1, head_dim) each.
Append = Callable[[int, Tensor, Tensor], None]


class StepLayer(CacheLayerMixin):
    """A layer of a :class:`StepCache`."""

    is_sliding = False

    def __init__(self, step: StepCache, index: int) -> None:
        super().__init__()
        self._step: StepCache = weakref.proxy(step)
        self._index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is no storage here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Have the states appended; they come back as they are."""
        self._step.append(self._index, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens so far, over all ranks."""
        self._step.asked = True
        return self._step.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As :meth:`ShardLayer.get_mask_sizes`."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class StepCache(Cache):
    """Stands in for any cache of a layout while the model reads one token, in a way that does not know which it is.

    Attributes:
        append: what keeps a layer's new keys and values.
        total: tokens seen so far by all ranks together.
        asked: whether the model has asked for ``total``: then what it does depends on a number on the host, which a
            graph would take for a constant.
    """

    def __init__(self, layers: int, append: Append) -> None:
        self.append = append
        self.total = 0
        self.asked = False
        super().__init__(layers=[StepLayer(self, index) for index in range(layers)])
