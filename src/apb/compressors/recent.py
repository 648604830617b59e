"""Ablation: the last tokens of a block, regardless of content."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import BlockView, Compressor


class Recent(Compressor):
    """Later tokens score higher, so the last ``passing_length`` are passed."""

    name: ClassVar[str] = "recent"

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        tokens, kv_heads, _ = view.k.shape
        return torch.arange(tokens, dtype=torch.float32, device=view.k.device).expand(kv_heads, tokens)
