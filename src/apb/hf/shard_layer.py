"""One layer of a rank's shard: keys and values in preallocated storage, with their true positions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .offloading import Far

if TYPE_CHECKING:
    from .cache import ShardCache


# Attributes of a layer that tell where its tokens are.
_STORAGE = ("keys", "values", "far", "arriving")


@dataclass(frozen=True)
class Arrival:
    """The rows that a pass adds to a layer of this shard.

    Attributes:
        kept: rows of the pass whose keys and values are kept; None for no row.
        positions: true positions of these rows, one range after the other.
        whole: True if the layer's attention gets the whole shard, as in decode; in prefill it gets the pass's own keys
            and values, including those of the anchor, which are not kept.
    """

    kept: slice | None
    positions: tuple[range, ...]
    whole: bool = False


class ShardLayer(CacheLayerMixin):
    """Keys and values of one layer: this rank's part of the prompt, then, on the tail rank, the generated tokens.

    Attributes:
        length: tokens held.
        positions: their true positions, in storage order.
        far: the first of them, if they are in host memory; keys and values are those after them.
        arriving: makes the work that follows wait for keys and values that are still on their way; None if they are
            here. See :meth:`arrive`.
    """

    is_sliding = False

    def __init__(self, shard: ShardCache, index: int) -> None:
        # Weakly: a cycle would keep gigabytes alive until Python's collector happens to run.
        self._shard: ShardCache = weakref.proxy(shard)
        super().__init__()
        self.index = index
        self.length = 0
        self.positions: list[range] = []
        self.arriving: Callable[[], None] | None = None
        self.far: Far | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _STORAGE:
            self._shard.changed()

    @property
    def away(self) -> int:
        """Number of tokens in host memory."""
        return 0 if self.far is None else self.far.tokens

    @property
    def near(self) -> int:
        """Number of tokens in the storage on the device."""
        return self.length - self.away

    @property
    def room(self) -> int:
        """Number of tokens for which the storage has room left."""
        assert self.keys is not None, "the cache has not been written yet"
        return self.keys.shape[2] - self.near

    @property
    def storage(self) -> tuple[Tensor, Tensor]:
        """Keys and values on the device, with the room that is left: (1, kv_heads, capacity, head_dim) each."""
        assert self.keys is not None and self.values is not None, "the cache has not been written yet"
        self.arrive()
        return self.keys, self.values

    def move_away(self, far: Far) -> None:
        """Copy the layer's first tokens to a storage in host memory that has no tokens yet, and free their own."""
        moved, rows = far.tokens - self.away, [slice(far.tokens - self.away, self.near)]
        before = (None, None) if self.far is None else (self.far.keys, self.far.values)
        kept = []
        for into, earlier, x in zip((far.keys, far.values), before, self.storage, strict=True):
            if earlier is not None:
                into[:, :, : self.away] = earlier
            into[:, :, self.away :].copy_(x[:, :, :moved], non_blocking=True)
            kept.append(_only(x, rows, max(x.shape[2] - moved, 1)))
        self.keys, self.values = kept
        self.far = far

    def share(self, other: ShardLayer, total: int) -> None:
        """Begin, while empty, with what another layer has in host memory of tokens at positions before ``total``."""
        if other.far is None:
            return
        held = [range(each.start, min(each.stop, total)) for each in other.positions]
        self.length = min(other.away, sum(map(len, held)))
        self.far = other.far.first(self.length)
        self.place(list(_first(held, self.length)))

    def rows(self, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, kv_heads, tokens, head_dim) from a row on, on the device; views if all are there."""
        keys, values = self.view()
        if self.far is None or start >= self.away:
            near = slice(start - self.away, None)
            return keys[:, :, near], values[:, :, near]
        far_keys, far_values = (x[:, :, start:].to(keys.device) for x in (self.far.keys, self.far.values))
        return torch.cat([far_keys, keys], 2), torch.cat([far_values, values], 2)

    def arrive(self) -> None:
        """Have whatever reads the keys and values from now on see them all; called before they are used."""
        if self.arriving is not None:
            arriving, self.arriving = self.arriving, None
            arriving()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the storage, (1, kv_heads, capacity, head_dim), of the dtype and on the device of the states."""
        capacity = max(self._shard.capacity, 1)
        self.keys = key_states.new_empty(*key_states.shape[:2], capacity, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the rows that belong to this shard, by the cache's :class:`Arrival`.

        An empty shard is returned with one dummy row: not all models can work on none.
        """
        arrival = self._shard.arrival(self.index)
        if not self.is_initialized and (arrival.kept is not None or arrival.whole):
            self.lazy_initialization(key_states, value_states)
        if arrival.kept is not None:
            self.append(key_states[:, :, arrival.kept], value_states[:, :, arrival.kept], arrival.positions)
        return self.view(at_least=1) if arrival.whole else (key_states, value_states)

    def place(self, positions: Sequence[range]) -> None:
        """Record the true positions of tokens that were appended."""
        for each in positions:
            if self.positions and self.positions[-1].stop == each.start:
                self.positions[-1] = range(self.positions[-1].start, each.stop)
            elif each:
                self.positions.append(each)

    def forget(self, start: int) -> None:
        """Drop the tokens at true positions from ``start`` on, which must have been the last to be appended."""
        while self.positions and self.positions[-1].stop > start:
            last = self.positions.pop()
            kept = range(last.start, max(last.start, start))
            self.length -= len(last) - len(kept)
            if kept:
                self.positions.append(kept)
        if self.far is not None and self.length < self.away:
            self.far = self.far.first(self.length)

    def drop_before(self, start: int) -> None:
        """Drop the tokens at true positions before ``start``, and the storage that they take."""
        assert self.keys is not None and self.values is not None, "the cache has not been written yet"
        assert self.far is None, "layers that drop tokens have a window, and stay on the device"
        parts, row = [], 0
        for each in self.positions:
            if each.stop > start:
                parts.append((row + max(start - each.start, 0), range(max(each.start, start), each.stop)))
            row += len(each)
        dropped = self.length - sum(len(places) for _, places in parts)
        if not dropped:
            return
        self.arrive()
        rows = [slice(first, first + len(places)) for first, places in parts]
        capacity = max(self.keys.shape[2] - dropped, 1)
        self.keys, self.values = _only(self.keys, rows, capacity), _only(self.values, rows, capacity)
        self.length, self.positions = self.length - dropped, [places for _, places in parts]

    def tail(self, start: int) -> tuple[Tensor, Tensor, list[range]]:
        """Copies of the tokens at true positions from ``start`` on, the last to be appended, and their positions."""
        positions = [range(max(each.start, start), each.stop) for each in self.positions if each.stop > start]
        keys, values = self.rows(self.length - sum(map(len, positions)))
        return keys.clone(), values.clone(), positions

    def until(self, stop: int) -> Iterator[tuple[Tensor, Tensor, range]]:
        """Keys, values and positions of the tokens on the device before position ``stop``, in storage order."""
        keys, values = self.view()
        yield keys[:, :, :0], values[:, :, :0], range(0)  # for the shape of a layer that has none
        row = -self.away
        for run in self.positions:
            part = range(run.start - min(row, 0), min(run.stop, stop))
            if part:
                first = max(row, 0)
                yield keys[:, :, first : first + len(part)], values[:, :, first : first + len(part)], part
            row += len(run)

    def append(self, keys: Tensor, values: Tensor, positions: Sequence[range]) -> None:
        """Append tokens at these true positions."""
        self.arrive()
        self._append(keys, values)
        self.place(positions)

    def view(self, at_least: int = 0) -> tuple[Tensor, Tensor]:
        """The filled part on the device: two (1, kv_heads, tokens, head_dim), of no tokens or ``at_least``."""
        assert self.keys is not None and self.values is not None, "the cache has not been written yet"
        self.arrive()
        length = max(self.near, at_least)
        return self.keys[:, :, :length], self.values[:, :, :length]

    def make_room(self, tokens: int) -> None:
        """Ensure storage for ``tokens`` more tokens; growing costs a copy."""
        assert self.keys is not None and self.values is not None
        capacity = self.keys.shape[2]
        if self.near + tokens > capacity:
            self.arrive()
            grown = max(self.near + tokens, capacity + self._shard.growth)
            self.keys, self.values = _grow(self.keys, grown), _grow(self.values, grown)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self.make_room(keys.shape[2])
        assert self.keys is not None and self.values is not None
        near = slice(self.near, self.near + keys.shape[2])
        self.keys[:, :, near] = keys
        self.values[:, :, near] = values
        self.length += keys.shape[2]
        self._shard.changed()

    def get_seq_length(self) -> int:
        """Tokens of the whole prompt and answer so far, over all ranks: transformers counts positions with it."""
        return self._shard.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes for building a mask, which this package's attention never needs."""
        return self._shard.total + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def _first(positions: Sequence[range], tokens: int) -> Iterator[range]:
    """The positions of the first tokens."""
    for each in positions:
        yield each[:tokens]
        tokens = max(tokens - len(each), 0)


def _only(x: Tensor, rows: Sequence[slice], capacity: int) -> Tensor:
    """A storage of its own that begins with these rows of (1, kv_heads, tokens, head_dim)."""
    kept = torch.empty(*x.shape[:2], capacity, x.shape[3], dtype=x.dtype, device=x.device)
    row = 0
    for part in rows:
        kept[:, :, row : row + part.stop - part.start] = x[:, :, part]
        row += part.stop - part.start
    return kept


def _grow(x: Tensor, capacity: int) -> Tensor:
    grown = torch.empty(*x.shape[:2], capacity, x.shape[3], dtype=x.dtype, device=x.device)
    grown[:, :, : x.shape[2]] = x
    return grown
