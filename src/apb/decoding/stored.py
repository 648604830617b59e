"""Decode methods that attend to a chosen part of the keys, in steps that are captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import chosen
from .base import StoredReader

if TYPE_CHECKING:
    from ..layers.base import AttentionInput
    from ..layers.shards import StoredShard
    from .selecting import SelectingReader


class SelectingStoredReader(StoredReader):
    """Chooses and attends by kernels that read the sizes and addresses of the indexes when they run."""

    def __init__(self, page_size: int | None, together: bool) -> None:
        """Make a reader; ``page_size``, ``together``: of :func:`apb.kernels.chosen.attention`."""
        self._page_size = page_size
        self._together = together
        self._heads = 0  # most query heads of a layer, known once layers were attended
        self._layers: list[tuple[chosen.Index | None, int]] = []
        self._away: list[tuple[Tensor, Tensor] | None] = []  # what is in host memory, by layer
        self._kv_heads: list[int] = []
        self._rows: list[list[int]] = []  # what the table has
        self._read = self._held = 0

    def begin(self, reader: SelectingReader, lengths: Sequence[int]) -> None:
        """See :meth:`StoredReader.begin`: what an index lacks is built; its address, sizes and budget are placed."""
        reader.make_ready()
        if not self._kv_heads:
            self._make_tables(reader, len(lengths))
        self._layers = [reader.stored(layer, keys) for layer, keys in enumerate(lengths)]
        self._away = [reader.cache.far(layer) if self.far else None for layer in range(len(lengths))]
        covered = [0 if index is None else index.covered for index, _ in self._layers]
        self._held = sum(keys * heads for keys, heads in zip(lengths, self._kv_heads, strict=True))
        self._read = self._held - sum(keys * heads for keys, heads in zip(covered, self._kv_heads, strict=True))
        self._place()

    def attend(self, layer: AttentionInput, shard: StoredShard) -> tuple[Tensor, Tensor]:
        """See :meth:`StoredReader.attend`."""
        if layer.q.shape[1] > self._heads:  # when a step runs for the first time, which is before it is captured
            self._heads = layer.q.shape[1]
            self._place()
        return chosen.attention(
            layer.q,
            shard.table,
            self._table,
            self._counts[layer.index],
            layer.index,
            layer.k.shape[1],
            layer.scale,
            shard.length,
            page_size=self._page_size,
            together=self._together,
            far=self.far,
            partial=shard.several,
        )

    def end(self, reader: SelectingReader) -> None:
        """See :meth:`StoredReader.end`."""
        reader.count(self._counts.sum() * (self._page_size or 1) + self._read, self._held)
        self._layers.clear()  # indexes end with their sessions; what is queued on this stream still finds them
        self._away.clear()

    def _make_tables(self, reader: SelectingReader, layers: int) -> None:
        """Graphs read these, so they stay where they are; what they point to may move."""
        keys = {layer: reader.cache.near(layer)[0] for layer in reader.cache.indices}
        self._kv_heads = [keys[layer].shape[1] if layer in keys else 0 for layer in range(layers)]
        device = next(iter(keys.values())).device
        self._table = torch.zeros(layers, chosen.COLUMNS, dtype=torch.long, device=device)
        self._counts = torch.zeros(layers, max(self._kv_heads), chosen.CHUNKS, dtype=torch.int32, device=device)
        self._scratch = torch.empty(0, dtype=torch.int32, device=device)

    def _place(self) -> None:
        """Write the table, if it changes."""
        room = max(chosen.scratch_size(self._heads, index) for index, _ in self._layers)
        if room > len(self._scratch):
            self._scratch = self._scratch.new_empty(room)
        rows = [
            chosen.row(index, budget * heads if self._together else budget, self._scratch, far)
            for (index, budget), heads, far in zip(self._layers, self._kv_heads, self._away, strict=True)
        ]
        if rows != self._rows:
            self._table.copy_(torch.tensor(rows))
            self._rows = rows
