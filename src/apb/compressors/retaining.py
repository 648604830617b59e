"""Trained scores: one small MLP per layer, the retaining heads of Locret (arXiv 2410.01805) that APB uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import BlockView, Compressor


@dataclass(frozen=True)
class Head:
    """The retaining head of one layer: fc1 (hidden, (heads + 2 kv_heads) * head_dim), fc2 (kv_heads, hidden)."""

    fc1: Tensor
    fc2: Tensor

    def __call__(self, qkv: Tensor) -> Tensor:
        """fc2(silu(fc1([q; k; v]))) for (tokens, features): (kv_heads, tokens) fp32."""
        return F.linear(F.silu(F.linear(qkv, self.fc1)), self.fc2).T.float()


class Retaining(Compressor):
    """Scores of the retaining heads from q, k and v before RoPE, max-pooled; ``heads``: one per layer."""

    name: ClassVar[str] = "retaining"
    needs_before_rope: ClassVar[bool] = True
    pooled: ClassVar[bool] = True

    def __init__(self, heads: Sequence[Head]) -> None:
        self.heads = tuple(heads)

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        assert view.before_rope is not None, "the engine provides it because needs_before_rope is set"
        return self.heads[view.layer](view.before_rope)
