"""Pages: a token attends to the pages of keys whose bounds promise it most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..planning.options import option
from .base import Decoding, Reader, Shard, share_option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pages(Decoding):
    """Quest (arXiv 2406.10774): the channel-wise least and largest keys of a page bound q.k over it.

    The heads of a group choose together: a page counts by the head to whom it promises most.
    """

    name: ClassVar[str] = "pages"

    share: float = share_option()
    page_size: int = option(16, "Consecutive keys that are attended to or left out together.", least=1)

    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        """See :meth:`Decoding.prepare`: bounds are built when the first token is read."""
        from .page_index import PageIndex
        from .selecting import SelectingReader

        indexes = cache.indexes.setdefault((self.name, self.page_size), {})
        return SelectingReader(indexes, lambda: PageIndex(self.page_size), self._best, self.share, backend)

    def _best(self, layer: int, scores: Tensor, sizes: Tensor, keys: int) -> Tensor:
        """The best pages of every KV head, within the budget; at least one."""
        import torch

        count = min(max(keys // self.page_size, 1), scores.shape[1])
        best = scores.topk(count, 1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
