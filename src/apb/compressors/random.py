"""Ablation: random tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import BlockView, Compressor


class Random(Compressor):
    """Uniform scores from seed, layer and block alone: the same on any device and number of ranks."""

    name: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        tokens, kv_heads, _ = view.k.shape
        generator = torch.Generator().manual_seed(hash((self.seed, view.layer, view.block.index)) % 2**63)
        return torch.rand(kv_heads, tokens, generator=generator).to(view.k.device)
