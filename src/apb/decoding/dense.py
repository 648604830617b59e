"""Exact decode: every new token attends to every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Decoding, Reader, Shard

if TYPE_CHECKING:
    from torch import Tensor

    from ..layers.base import AttentionInput
    from ..layers.shards import NewRows


@dataclass(frozen=True)
class Dense(Decoding):
    """Attention over the whole cache, as transformers decodes."""

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True

    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        """See :meth:`Decoding.prepare`: nothing is built."""
        return DenseReader(backend)

    def stored_reader(self) -> Reader:
        """See :meth:`Decoding.stored_reader`."""
        return DenseReader("auto")


@dataclass(frozen=True)
class DenseReader(Reader):
    """Attends to all keys of a shard, in one call of attention."""

    backend: str

    def attend(self, layer: AttentionInput, rows: NewRows) -> tuple[Tensor, Tensor]:
        """See :meth:`Reader.attend`."""
        if rows.stored is not None:
            from ..kernels import decode  # Triton: there where GPUs are

            kv_heads = layer.k.shape[1]
            table, length, partial = rows.stored.table, rows.stored.length, rows.stored.several
            return decode.cached_attention(layer.q, table, layer.index, kv_heads, layer.scale, length, partial=partial)
        from ..layers.shards import full_partial

        return full_partial(layer, rows, self.backend)
