"""Training-free scores: the attention of the true query rows, carried through the same forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..planning.shape import ModelShape
from .base import BlockView, Compressor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Query(Compressor):
    """softmax(q k^T) of the query rows over the block, averaged over rows and the group's heads, max-pooled.

    After Spava (arXiv 2601.21444): the query rows stand at their true positions and have read all blocks in the layers
    below, so their attention shows what they will look for.
    """

    name: ClassVar[str] = "query"
    pooled: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        from ..kernels.selection import attention_received

        return attention_received(view.query, view.k, view.scale, view.softcap)

    def flops(self, model: ModelShape, query: int) -> int:
        """See :meth:`Compressor.flops`: the product of all query rows with the token's key."""
        return 2 * query * model.heads * model.head_dim

    def compare(self, view: BlockView, scores: Tensor) -> Tensor:
        """See :meth:`Compressor.compare`: shares of the rows' attention to the whole text instead of the block."""
        from ..kernels.selection import attention_received

        return attention_received(view.query, view.k, view.scale, view.softcap, view.lse)

    def flops_to_compare(self, model: ModelShape, query: int) -> int:
        """See :meth:`Compressor.flops_to_compare`: that product once more."""
        return self.flops(model, query)
