"""Training-free scores: attention of the true query rows, carried through the same forward pass."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..kernels.selection import attention_received
from .base import BlockView, Compressor


class Query(Compressor):
    """softmax(q k^T) of the query rows over the block, averaged over rows and the group's heads, max-pooled.

    After Spava (arXiv 2601.21444): the query rows are at their true positions and have attended to all blocks in the
    layers below, so their attention predicts what they will look for.
    """

    name: ClassVar[str] = "query"
    pooled: ClassVar[bool] = True

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        return attention_received(view.query, view.k, view.scale, view.softcap)
