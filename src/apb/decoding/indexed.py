"""Decode methods that attend to a part of the keys, chosen by an index of them: what all of these share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from ..planning.options import option
from .base import Decoding, Reader, Shard

if TYPE_CHECKING:  # a decode method can be named without torch
    from torch import Tensor

    from .selecting import KeyIndex, SelectingReader


@dataclass(frozen=True)
class Indexed(Decoding):
    """A token attends to a share of the keys. A subclass says what the index is and how it chooses."""

    share: float = option(0.25, "Share of the keys that a new token attends to, above 0 and at most 1.", kind=float)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise InputError(f"The share of keys must be above 0 and at most 1, not {self.share}.")

    @property
    @abstractmethod
    def index_key(self) -> tuple[str, int]:
        """See :attr:`Decoding.index_key`."""

    @abstractmethod
    def new_index(self) -> KeyIndex:
        """See :meth:`Decoding.new_index`."""

    @abstractmethod
    def choose(self, scores: Tensor, sizes: Tensor, keys: int) -> Tensor:
        """The units of keys that a row attends to, as :func:`apb.kernels.chosen.within`: (kv_heads, units) bool.

        Args:
            scores, sizes: (kv_heads, units), of :meth:`KeyIndex.scores`.
            keys: so many of them may be chosen by KV head, at least 0.
        """

    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        """See :meth:`Decoding.prepare`: what the index lacks is built when the first token is read."""
        return self._reader(cache, backend)

    def build(self, cache: Shard) -> None:
        """See :meth:`Decoding.build`: but for keys that only a pass makes."""
        self._reader(cache, "auto").make_ready()

    def _reader(self, cache: Shard, backend: str) -> SelectingReader:
        from .selecting import SelectingReader

        indexes = cache.indexes.setdefault(self.index_key, {})
        return SelectingReader(cache, indexes, self.new_index, self.choose, self.share, backend)
