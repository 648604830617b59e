"""Ablation: tokens drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..planning.shape import ModelShape
from .base import BlockView, Compressor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Random(Compressor):
    """Uniform scores that depend on seed, layer and block alone: the same on any device and number of ranks."""

    name: ClassVar[str] = "random"
    comparable: ClassVar[bool] = True

    seed: int = 0

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        import torch

        tokens, kv_heads, _ = view.k.shape
        generator = torch.Generator().manual_seed(hash((self.seed, view.layer, view.block.index)) % 2**63)
        return torch.rand(kv_heads, tokens, generator=generator).to(view.k.device)

    def flops(self, model: ModelShape, query: int) -> int:
        """See :meth:`Compressor.flops`: none."""
        return 0
