"""Training-free scores: the attention of the true query rows, carried through the same forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        return self.score_run([view])[0]

    def score_all(self, views: Sequence[BlockView]) -> list[Tensor]:
        """See :meth:`Compressor.score_all`."""
        return [scores for run in _runs(views) for scores in self.score_run(run)]

    def score_run(self, run: Sequence[BlockView]) -> Tensor:
        """Scores (blocks, kv_heads, tokens) of blocks that differ in nothing but their place."""
        return _received(run, None)

    def flops(self, model: ModelShape, query: int) -> int:
        """See :meth:`Compressor.flops`: the product of all query rows with the token's key."""
        return 2 * query * model.heads * model.head_dim

    def compare(self, view: BlockView, scores: Tensor) -> Tensor:
        """See :meth:`Compressor.compare`: shares of the rows' attention to the whole text instead of the block."""
        return _received([view], view.lse)[0]

    def compare_all(self, views: Sequence[BlockView], scores: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Compressor.compare_all`."""
        return [each for run in _runs(views) for each in _received(run, run[0].lse)]

    def flops_to_compare(self, model: ModelShape, query: int) -> int:
        """See :meth:`Compressor.flops_to_compare`: that product once more."""
        return self.flops(model, query)


def _received(run: Sequence[BlockView], lse: Tensor | None) -> Tensor:
    """The attention (blocks, kv_heads, tokens) that the keys of a run of blocks receive from the query's rows."""
    from ..kernels.selection import attention_received

    first = run[0]
    step = run[1].k.storage_offset() - first.k.storage_offset() if len(run) > 1 else 0
    keys = first.k.as_strided((len(run), *first.k.shape), (step, *first.k.stride()))
    return attention_received(first.query, keys, first.scale, first.softcap, lse)


def _runs(views: Sequence[BlockView]) -> Iterator[list[BlockView]]:
    """Blocks in runs: of one length, passing equally many pairs, at equal distances in one tensor."""
    run: list[BlockView] = []
    for view in views:
        if run:
            last = run[-1]
            alike = (last.k.shape, last.k.stride(), last.passed) == (view.k.shape, view.k.stride(), view.passed)
            shared = last.k.untyped_storage().data_ptr() == view.k.untyped_storage().data_ptr()
            step = view.k.storage_offset() - last.k.storage_offset()
            even = len(run) == 1 or step == last.k.storage_offset() - run[-2].k.storage_offset()
            if not (alike and shared and even and step > 0):
                yield run
                run = []
        run.append(view)
    if run:
        yield run
