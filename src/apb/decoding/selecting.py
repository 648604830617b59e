"""Decode methods that attend to a chosen part of the keys: what :class:`Pages` and :class:`Squeezed` share.

An index of a layer's keys is kept with the cache, covers what was held when it was built or when a session first read a
token, and shrinks with the cache. Keys that it does not cover, the last ones among them, are always attended to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..kernels import chosen
from ..kernels.attention import Segment, attention
from ..timing import timed
from .base import RECENT, Reader, Shard
from .held import Held, in_place

if TYPE_CHECKING:
    from torch import Tensor

    from ..layers.base import AttentionInput
    from ..layers.shards import NewRows


class KeyIndex(ABC):
    """An index of one layer's first ``covered`` keys.

    Attributes:
        covered: keys at the shard's beginning that can be chosen or left out.
    """

    covered: int = 0

    @abstractmethod
    def extend(self, keys: Tensor) -> None:
        """Cover as many of ``keys`` (kv_heads, tokens, head_dim) as can be, which follow those that are covered."""

    @abstractmethod
    def forget(self, tokens: int) -> None:
        """Cover no keys beyond the first ``tokens``: the cache has dropped them."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`apb.decoding.base.LayerIndex.tensors`."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`apb.decoding.base.LayerIndex.restore`."""

    @abstractmethod
    def scores(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """How much a row may attend to each unit of keys that is chosen as a whole.

        Args:
            q: (kv_heads, group, head_dim) fp32, the row's heads by KV head, times the scale.

        Returns:
            scores (kv_heads, units) fp32, comparable between KV heads, and sizes (kv_heads, units), the units' keys.
        """

    @abstractmethod
    def stored(self) -> chosen.Index | None:
        """What kernels read of it; None if it covers no key."""

    @abstractmethod
    def keys_of(self, chosen: Tensor) -> Tensor:
        """The keys, bool (kv_heads, covered), of the units chosen, bool (kv_heads, units)."""


# See Indexed.choose.
Choose = Callable[["Tensor", "Tensor", int], "Tensor"]


class SelectingReader(Reader):
    """Attends to the units of keys that are chosen, and to all keys that the indexes do not cover."""

    def __init__(
        self,
        cache: Shard,
        indexes: dict[int, Any],
        make: Callable[[], KeyIndex],
        choose: Choose,
        share: float,
        backend: str,
    ) -> None:
        """Make a reader of a shard.

        Args:
            cache: the shard.
            indexes: by layer, kept with the shard; those that are not there yet are built when they are first needed.
            make: an empty index.
            choose: chooses the units.
            share: share of all keys, above 0 and at most 1, that a row is to attend to.
            backend: of :func:`apb.attention`.
        """
        self.cache = cache
        self._indexes = indexes
        self._make = make
        self._choose = choose
        self._wanted = share
        self._backend = backend
        self._ready: set[int] = set()
        self._attended: int | Tensor = 0
        self._held = 0

    @property
    def share(self) -> float:  # type: ignore[override]
        """The share of the keys that rows have attended to so far, over all layers and KV heads; 1 before any row."""
        return int(self._attended) / self._held if self._held else 1.0

    def attend(self, layer: AttentionInput, rows: NewRows) -> tuple[Tensor, Tensor]:
        """See :meth:`Reader.attend`: every row chooses for itself, as if it had been read alone."""
        count, held = layer.q.shape[0], self._of(layer.kept, layer.k, layer.v)
        own = rows.holds_own(count)
        if layer.kept not in self._ready:
            self._ready.add(layer.kept)
            self.build(layer.kept, held.first(len(held) - count if own else len(held)))
        seen = [len(held) - (count - 1 - row) if own else len(held) for row in range(count)]
        with timed("attention"):
            parts = [
                self._row(replace(layer, q=layer.q[row : row + 1]), held.first(stop)) for row, stop in enumerate(seen)
            ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def make_ready(self) -> None:
        """Make the indexes of all layers now, or what they lack, but for keys that only a pass makes."""
        cache = self.cache
        for layer in cache.indices:
            if layer not in self._ready and layer not in cache.windows and not cache.expands:
                self._ready.add(layer)
                self.build(layer, self._of(layer, *cache.near(layer)))

    def stored(self, layer: int, keys: int) -> tuple[chosen.Index | None, int]:
        """What kernels read of a layer's index, and the keys that may be chosen of each KV head, of so many held."""
        index: KeyIndex | None = self._indexes.get(layer)
        return (None, 0) if index is None else (index.stored(), self._budget(index.covered, keys))

    def count(self, attended: int | Tensor, held: int) -> None:
        """Note that a row has attended to so many of the keys that are held, over all layers and KV heads."""
        self._attended = self._attended + attended
        self._held += held

    def build(self, layer: int, held: Held) -> None:
        """Make the index of a layer, or what it lacks, over its keys but for the last."""
        index: KeyIndex = self._indexes.setdefault(layer, self._make())
        stop = max(len(held) - RECENT, 0)
        index.forget(stop)  # an earlier, longer question may have covered more
        if index.covered < stop:
            index.extend(held.between(index.covered, stop)[0].transpose(0, 1))

    def _of(self, layer: int, k: Tensor, v: Tensor) -> Held:
        """The layer's keys and values, of which these are on the device."""
        return Held(in_place(self.cache.far(layer), k.device), k, v)

    def _row(self, layer: AttentionInput, held: Held) -> tuple[Tensor, Tensor]:
        """One row that sees all of a shard: out (1, heads, head_dim) and lse (heads, 1)."""
        index: KeyIndex = self._indexes[layer.kept]
        keys, kv_heads, covered = len(held), layer.k.shape[1], index.covered
        rest = held.between(covered, keys)
        self.count((keys - covered) * kv_heads, keys * kv_heads)
        if not covered:
            return attention(layer.q, [Segment(*rest)], layer.scale, self._backend, layer.softcap)
        grouped = layer.q[0].unflatten(0, (kv_heads, -1))
        scores, sizes = index.scores(grouped.float() * layer.scale)
        picked = index.keys_of(self._choose(scores, sizes, self._budget(covered, keys)))
        parts = []
        for head, pair in enumerate(held.chosen(picked)):  # as many keys as each of them chose
            self.count(len(pair[0]), 0)
            segments = [Segment(*pair), Segment(rest[0][:, head : head + 1], rest[1][:, head : head + 1])]
            parts.append(attention(grouped[head : head + 1], segments, layer.scale, self._backend, layer.softcap))
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 0)

    def _budget(self, covered: int, keys: int) -> int:
        """How many of a layer's keys may be chosen: those that its index does not cover are attended to anyway."""
        return max(covered - math.ceil((1 - self._wanted) * keys), 0)
