"""Compressors that are being measured, and are not part of the package unless they win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apb.compressors import BlockView, QueryEdge
from apb.methods import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Observers(QueryEdge):
    """The attention of a block's own last rows, which need no question (SnapKV, arXiv 2404.14469), and its edge."""

    name: ClassVar[str] = "observers"

    observers: int = option(64, "Rows at a block's end whose attention counts.", least=1)

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`apb.compressors.Compressor.score`."""
        from apb.kernels.selection import attention_received

        scores = attention_received(view.q[-self.observers :], view.k, view.scale, view.softcap)
        edge = min(max(self.longest_edge, self.observers), view.passed // 4)
        scores[:, scores.shape[1] - edge :] = 2.0
        return scores
