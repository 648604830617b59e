"""Retrieval: keys and values in host memory, of which a token fetches those that an index on the device chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import InputError
from ..planning.options import option
from .base import RECENT, Reader, Shard, StoredReader
from .indexed import Indexed
from .pages import Pages
from .squeezed import Squeezed

if TYPE_CHECKING:
    from torch import Tensor

    from .selecting import KeyIndex

_SELECTORS: dict[str, type[Indexed]] = {kind.name: kind for kind in (Pages, Squeezed)}


@dataclass(frozen=True)
class Retrieval(Indexed):
    """After RetrievalAttention (arXiv 2409.10516), with the index of another method instead of a graph of keys.

    What it attends to is what its selector would; the last keys and those of new tokens stay on the device.
    """

    name: ClassVar[str] = "retrieval"
    offloads: ClassVar[bool] = True

    selector: str = option("pages", "What chooses the keys that are fetched: pages or squeezed.", kind=str)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selector not in _SELECTORS:
            raise InputError(f"Unknown selector {self.selector!r}; choose one of {', '.join(_SELECTORS)}.")

    @property
    def index_key(self) -> tuple[str, int]:
        """See :attr:`Decoding.index_key`: the selector's."""
        return self._selector.index_key

    def new_index(self) -> KeyIndex:
        """See :meth:`Decoding.new_index`: the selector's."""
        return self._selector.new_index()

    def choose(self, scores: Tensor, sizes: Tensor, keys: int) -> Tensor:
        """See :meth:`Indexed.choose`: as the selector does."""
        return self._selector.choose(scores, sizes, keys)

    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        """See :meth:`Decoding.prepare`: what has been read is indexed, and moves to host memory."""
        self.build(cache)
        return super().prepare(cache, backend)

    def build(self, cache: Shard) -> None:
        """See :meth:`Decoding.build`: the index is made while the keys are on the device, before they move."""
        super().build(cache)
        cache.move_away(RECENT)

    def stored_reader(self) -> StoredReader | None:
        """See :meth:`Decoding.stored_reader`: the selector's, which reads chosen keys where they are."""
        stored = self._selector.stored_reader()
        if stored is not None:
            stored.far = True
        return stored

    @property
    def _selector(self) -> Indexed:
        return _SELECTORS[self.selector](self.share)
