"""Exact decode: every new token attends to every key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from .base import Decoding, Reader, Shard, StoredReader

if TYPE_CHECKING:
    from torch import Tensor

    from ..layers.base import AttentionInput
    from ..layers.shards import NewRows, StoredShard


@dataclass(frozen=True)
class Dense(Decoding):
    """Attention over the whole cache, as transformers decodes."""

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True

    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        """See :meth:`Decoding.prepare`: nothing is built."""
        return DenseReader(cache, backend)

    def stored_reader(self) -> StoredReader:
        """See :meth:`Decoding.stored_reader`."""
        return DenseStoredReader()


class DenseReader(Reader):
    """Attends to all keys of a shard, in one call of attention; those in host memory come a layer at a time."""

    def __init__(self, cache: Shard, backend: str) -> None:
        from .streaming import Streaming

        self._streaming = Streaming(cache)
        self._backend = backend

    def attend(self, layer: AttentionInput, rows: NewRows) -> tuple[Tensor, Tensor]:
        """See :meth:`Reader.attend`."""
        from ..layers.base import as_wide
        from ..layers.shards import full_partial

        far = self._streaming.fetch(layer.kept, layer.q.device)
        if far is not None:
            layer = replace(layer, earlier=(far[0], as_wide(far[1], layer.v)))
        return full_partial(layer, rows, self._backend)


class DenseStoredReader(StoredReader):
    """Attends to all keys of a shard, by a kernel that reads their addresses when it runs."""

    batched: ClassVar[bool] = True

    def attend(self, layer: AttentionInput, shard: StoredShard) -> tuple[Tensor, Tensor]:
        """See :meth:`StoredReader.attend`."""
        from ..kernels import decode  # Triton: there where GPUs are

        return decode.cached_attention(
            layer.q, shard.table, layer.index, layer.k.shape[1], layer.scale, shard.length, partial=shard.several
        )
