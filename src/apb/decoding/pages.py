"""Pages: a token attends to the pages of keys whose bounds promise it most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..planning.options import option
from .indexed import Indexed

if TYPE_CHECKING:
    from torch import Tensor

    from .base import StoredReader
    from .selecting import KeyIndex


@dataclass(frozen=True)
class Pages(Indexed):
    """Quest (arXiv 2406.10774): the channel-wise least and largest keys of a page bound q.k over it.

    The heads of a group choose together: a page counts by the head to whom it promises most.
    """

    name: ClassVar[str] = "pages"

    page_size: int = option(16, "Consecutive keys that are attended to or left out together.", least=1)

    @property
    def index_key(self) -> tuple[str, int]:
        """See :attr:`Decoding.index_key`."""
        return Pages.name, self.page_size

    def new_index(self) -> KeyIndex:
        """See :meth:`Decoding.new_index`: bounds of pages."""
        from .page_index import PageIndex

        return PageIndex(self.page_size)

    def choose(self, scores: Tensor, sizes: Tensor, keys: int) -> Tensor:
        """See :meth:`Indexed.choose`: the best pages of every KV head."""
        from ..kernels.chosen import within

        return within(scores, sizes, keys)

    def stored_reader(self) -> StoredReader:
        """See :meth:`Decoding.stored_reader`."""
        from .stored import SelectingStoredReader

        return SelectingStoredReader(self.page_size, together=False)
