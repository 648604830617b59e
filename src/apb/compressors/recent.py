"""Ablation: the last tokens of a block, regardless of content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..planning.shape import ModelShape
from .base import BlockView, Compressor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Recent(Compressor):
    """Later tokens score higher, so the last ``passing_length`` are passed."""

    name: ClassVar[str] = "recent"
    comparable: ClassVar[bool] = True

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        import torch

        positions = torch.arange(view.block.start, view.block.stop, dtype=torch.float32, device=view.k.device)
        return positions.expand(view.k.shape[1], -1)

    def flops(self, model: ModelShape, query: int) -> int:
        """See :meth:`Compressor.flops`: none."""
        return 0
