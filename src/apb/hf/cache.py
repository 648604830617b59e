"""A transformers cache that holds one rank's shard, in preallocated storage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..decoding.base import LayerIndex
from ..errors import InputError
from ..layers.recurrent import RecurrentInput, State
from .offloading import offload
from .shard_layer import Arrival, ShardLayer
from .tail import Tail, bytes_of


@dataclass(frozen=True)
class Layout:
    """The properties of a cache that captured graphs depend on: caches of one layout are stepped by the same graphs.

    Attributes:
        keeps_new: True if generated tokens are kept in it.
        device, dtype: of all keys and values.
        heads: (kv_heads, head_dim) of every layer; None for a layer that has no keys and values.
    """

    keeps_new: bool
    device: torch.device
    dtype: torch.dtype
    heads: tuple[tuple[int, int] | None, ...]


class ShardCache(Cache):
    """One rank's shard of all layers; layers that get no keys and values stay empty.

    Attributes:
        capacity: tokens that a layer's storage is made for when it is first written; it grows by ``growth`` when full.
        keeps_new: True if this rank keeps the tokens that are generated.
        arrival: :class:`Arrival` of the current pass, by the index of a layer.
        total: tokens seen so far by all ranks together.
        indexes: see :class:`apb.decoding.Shard`.
        states: by recurrent layer its state after those, the same on every rank.
        windows: by layer its window in tokens, own token included; without an entry it sees all.
        expands: see :class:`apb.decoding.Shard`.
    """

    growth = 256

    def __init__(
        self,
        layers: int,
        *,
        capacity: int,
        keeps_new: bool,
        total: int,
        windows: Mapping[int, int] | None = None,
        expands: bool = False,
    ) -> None:
        """``windows`` may be filled later, while the layers run for the first time."""
        self.windows = {} if windows is None else windows
        self.expands = expands
        self._least = 0  # tokens below which it cannot return
        self.capacity = capacity
        self.keeps_new = keeps_new
        self.arrival: Callable[[int], Arrival] = lambda layer: Arrival(None, ())
        self.total = total
        self.indexes: dict[Hashable, dict[int, LayerIndex]] = {}
        self.states: dict[int, State] = {}
        # States after fewer tokens, to return to: unlike keys, they cannot be cut.
        self._marks: dict[int, dict[int, State]] = {}
        # See addresses and make_room, which are called at every decode step; None until they are asked for.
        self._addresses: list[tuple[int, int, int]] | None = None
        self._room: int | None = None
        super().__init__(layers=[ShardLayer(self, index) for index in range(layers)])

    def expect(self, positions: range) -> None:
        """Prepare for a pass over new rows at these positions, which attends to the whole shard."""
        arrival = Arrival(slice(None) if self.keeps_new else None, (positions,), whole=True)
        self.arrival = lambda layer: arrival
        self.total = positions.stop

    @property
    def indices(self) -> list[int]:
        """Indices of the layers that have keys and values."""
        return [layer.index for layer in self._kept()]

    def positions(self, layer: int) -> list[range]:
        """True positions of the tokens in a layer of this shard, in storage order."""
        return self._layer(layer).positions

    @cached_property
    def layout(self) -> Layout:
        """The layout, once the cache has been written."""
        assert all(x is not None and x.is_contiguous() for layer in self._kept() for x in (layer.keys, layer.values))
        keys = [layer.keys if isinstance(layer, ShardLayer) else None for layer in self.layers]
        first = next(x for x in keys if x is not None)
        heads = tuple(None if x is None else (x.shape[1], x.shape[3]) for x in keys)
        return Layout(self.keeps_new, first.device, first.dtype, heads)

    @property
    def held(self) -> list[int]:
        """Tokens that this rank holds of every layer; 0 of one that has no keys and values."""
        return [layer.length if isinstance(layer, ShardLayer) else 0 for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of all layers on the device, with the room that is left in it, and of states."""
        kept = (x for layer in self._kept() for x in (layer.keys, layer.values))
        return sum(x.nbytes for x in kept if x is not None) + bytes_of(self.states)

    @property
    def filled(self) -> int:
        """Bytes of the keys and values that are held there, and of states."""
        kept = ((layer, x) for layer in self._kept() for x in (layer.keys, layer.values))
        return sum(x[:, :, : layer.near].nbytes for layer, x in kept if x is not None) + bytes_of(self.states)

    def reserve(self, tokens: int) -> None:
        """Ensure storage for so many more tokens, if this rank keeps them: growing once is cheaper than in steps."""
        for layer in self._kept() if self.keeps_new else ():
            layer.make_room(tokens)

    def changed(self) -> None:
        """Note that a layer's storage is another, or holds more than :meth:`advance` counts."""
        self._addresses = self._room = None

    def make_room(self) -> None:
        """Ensure storage for one more token, if this rank keeps it."""
        if not self.keeps_new or self._room:
            return
        for layer in self._kept():
            layer.make_room(1)
        self._room = min((layer.room for layer in self._kept()), default=0)

    def advance(self) -> None:
        """Count one more token, which was appended if this rank keeps it."""
        if self.keeps_new:
            for layer in self._kept():
                layer.length += 1
                layer.place((range(self.total, self.total + 1),))
            self._room = None if self._room is None else self._room - 1
        self.total += 1

    def recur(self, layer: RecurrentInput) -> Tensor:
        """:data:`apb.layers.recurrent.Recur` of rows after all that are held."""
        return layer.read(layer.hidden, self.states.setdefault(layer.index, layer.fresh()))

    def move_beside(self, device_of: Callable[[int], torch.device]) -> None:
        """Have the states of recurrent layers and what decode methods keep elsewhere, and no states to return to."""
        self.states = {layer: state.to(device_of(layer)) for layer, state in self.states.items()}
        self._marks.clear()
        for indexes in self.indexes.values():
            for layer, index in indexes.items():
                if parts := index.tensors():
                    index.restore({name: part.to(device_of(layer)) for name, part in parts.items()})

    def mark(self, total: int, states: Mapping[int, State]) -> None:
        """Keep copies of the states of recurrent layers after ``total`` tokens, so that :meth:`forget` can return."""
        if states:
            self._marks[total] = {layer: state.copy() for layer, state in states.items()}

    def keep_windows(self, total: int) -> None:
        """Keep of layers with a window only what rows after the first ``total`` tokens can see, or later ones.

        Nobody may return to fewer tokens than that afterwards.
        """
        for layer in self._kept():
            start = total + 1 - self.windows.get(layer.index, total + 1)
            if start <= 0:
                continue
            layer.drop_before(start)
            self._least = total
            for indexes in self.indexes.values():
                indexes.pop(layer.index, None)

    def forget(self, total: int) -> None:
        """Return to the state after the first ``total`` tokens; those after them must have been read by passes.

        InputError if a model with recurrent layers is to return to where no state was kept, or one with windows to
        where its keys are not there any more. It is, from now on, there.
        """
        if total < self._least:
            raise InputError(
                f"What layers with a window see after {total} tokens is not there any more; read the text again."
            )
        if self.states and total == self.total:
            self.mark(total, self.states)
        elif self.states and total not in self._marks:
            raise InputError(
                f"The state of the recurrent layers after {total} tokens is not there any more; read the text again."
            )
        elif self.states:
            self.states = {layer: state.copy() for layer, state in self._marks[total].items()}
        self._marks = {place: states for place, states in self._marks.items() if place <= total}
        for layer in self._kept():
            layer.forget(total)
            for indexes in self.indexes.values():
                if layer.index in indexes:
                    indexes[layer.index].forget(layer.length)
        self.total = total

    def cut(self, total: int) -> Tail:
        """As :meth:`forget`, but return what is dropped."""
        states = {layer: state.copy() for layer, state in self.states.items()}  # steps write them in place
        tail = Tail({layer.index: layer.tail(total) for layer in self._kept()}, self.total, states)
        self.forget(total)
        return tail

    def restore(self, tail: Tail) -> None:
        """Append what :meth:`cut` returned, in the state in which it left the cache."""
        for index, (keys, values, positions) in tail.layers.items():
            self._layer(index).append(keys, values, positions)
        self.states = {layer: state.copy() for layer, state in tail.states.items()}
        self.total = tail.total

    def fill(self, layer: int, keys: Tensor, values: Tensor, positions: Sequence[range]) -> None:
        """Append to a layer: keys, values (1, kv_heads, tokens, head_dim) and their true positions.

        A layer that has not been written yet gets storage for ``capacity`` tokens.
        """
        into = self._layer(layer)
        if not into.is_initialized:
            into.lazy_initialization(keys, values)
        into.append(keys, values, positions)

    def put(self, layer: int, keys: Tensor, values: Tensor, arriving: Callable[[], None] | None) -> None:
        """Make these the storage of a layer, which keeps its tokens: the same ones, elsewhere or on their way.

        Args:
            layer: index of the layer.
            keys, values: (1, kv_heads, capacity, head_dim).
            arriving: see :class:`ShardLayer`.
        """
        into = self._layer(layer)
        into.keys, into.values, into.arriving = keys, values, arriving

    def copy(self, total: int, room: int) -> ShardCache:
        """The first ``total`` tokens, in storage of their own with room for more; those after them must be newer."""
        kept = {"keeps_new": self.keeps_new, "windows": dict(self.windows), "expands": self.expands}
        made = ShardCache(len(self.layers), capacity=0, total=total, **kept)  # type: ignore[arg-type]
        made._least = self._least
        for layer in self._kept():
            made.capacity = layer.near + room * self.keeps_new
            made._layer(layer.index).share(layer, total)
            for keys, values, places in layer.until(total):
                made.fill(layer.index, keys, values, [places])
        for key, indexes in self.indexes.items():
            made.indexes[key] = {place: copy(index) for place, index in indexes.items()}
            for place, index in made.indexes[key].items():
                index.forget(made._layer(place).length)
        states = self.states if total == self.total else self._marks.get(total, {})
        made.states = {layer: state.copy() for layer, state in states.items()}
        return made

    def clear(self) -> None:
        """Free the storage of all layers."""
        self.indexes.clear()
        for layer in list(self._kept()):
            layer.keys = layer.values = layer.arriving = layer.far = None

    def addresses(self) -> list[tuple[int, int, int]]:
        """Every layer's storage: the addresses of keys and of values, and the capacity; zeros if there is none.

        Behind tokens in host memory they are where the layer's first token would be. It is the same list until one of
        them changes.
        """
        if self._addresses is not None:
            return self._addresses
        places: list[tuple[int, int, int]] = []
        for layer in self.layers:
            if isinstance(layer, ShardLayer) and layer.keys is not None and layer.values is not None:
                layer.arrive()
                k, v = (x.data_ptr() - layer.away * x.shape[3] * x.itemsize for x in (layer.keys, layer.values))
                places.append((k, v, layer.keys.shape[2]))
            else:
                places.append((0, 0, 0))
        self._addresses = places
        return places

    def shard(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that this rank holds of a layer: two (tokens, kv_heads, head_dim), on the device.

        They are views, unless some are in host memory.
        """
        keys, values = self._layer(layer).rows(0)
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    def near(self, layer: int) -> tuple[Tensor, Tensor]:
        """See :meth:`apb.decoding.Shard.near`."""
        keys, values = self._layer(layer).view()
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    def far(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """See :meth:`apb.decoding.Shard.far`."""
        far = self._layer(layer).far
        return None if far is None else (far.keys[0].transpose(0, 1), far.values[0].transpose(0, 1))

    @property
    def offloaded(self) -> bool:
        """True if some of it is in host memory while it is in use."""
        return any(layer.away for layer in self._kept())

    def move_away(self, keep: int) -> None:
        """See :meth:`apb.decoding.Shard.move_away`. What has come since the last time may stay, if it is little."""
        offload([layer for layer in self._kept() if layer.index not in self.windows], keep)

    def _kept(self) -> Iterator[ShardLayer]:
        """The layers that have keys and values."""
        return (layer for layer in self.layers if isinstance(layer, ShardLayer) and layer.keys is not None)

    def _layer(self, index: int) -> ShardLayer:
        layer = self.layers[index]
        assert isinstance(layer, ShardLayer)
        return layer


def dynamic_cache(
    layers: Sequence[tuple[int, Tensor, Tensor]], states: Mapping[int, State], config: Any
) -> DynamicCache:
    """transformers' own cache of (layer, keys, values (kv_heads, tokens, head_dim)), in order, and of states by layer.

    InputError if it has no place for them.
    """
    cache = DynamicCache(config=config) if states else DynamicCache()
    for layer, state in states.items():
        state.copy_into(cache.layers[layer])
    for layer, keys, values in layers:
        cache.update(keys.unsqueeze(0), values.unsqueeze(0), layer)
    return cache
