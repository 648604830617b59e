"""Training-free scores: the attention of the true query rows, carried through the same forward pass."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.reference import capped
from .base import BlockView, Compressor, pool

# Query rows scored at a time: bounds the (heads, rows, tokens) matrix for long questions.
_ROWS = 64


class Query(Compressor):
    """softmax(q k^T) of the query rows over the block, averaged over rows and the group's heads, max-pooled.

    After Spava (arXiv 2601.21444): the query rows stand at their true positions and have read all blocks in the layers
    below, so their attention says what they will look for.
    """

    name: ClassVar[str] = "query"

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        rows, heads, head_dim = view.query.shape
        tokens, kv_heads, _ = view.k.shape
        keys = view.k.permute(1, 2, 0)  # (kv_heads, head_dim, tokens)
        total = torch.zeros(kv_heads, tokens, dtype=torch.float32, device=view.k.device)
        for chunk in view.query.split(_ROWS):
            # (rows, kv_heads * group, head_dim) -> (kv_heads, rows * group, head_dim)
            grouped = chunk.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, head_dim)
            total += capped((grouped @ keys).float() * view.scale, view.softcap).softmax(-1).sum(1)
        return pool(total / (rows * heads // kv_heads))
