"""What a compressor is: a score for every token of a block, per KV head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import Block


@dataclass(frozen=True)
class BlockView:
    """What a compressor may look at: one block in one layer.

    Attributes:
        layer: index of the layer.
        block: the block, with its true positions.
        k, v: (tokens, kv_heads, head_dim), keys after RoPE.
        query: (query tokens, heads, head_dim), the true query rows after RoPE, at their true positions.
        scale: the layer's factor on q.k.
        softcap: what the layer caps its logits at; None where it does not.
        before_rope: (tokens, (heads + 2 kv_heads) * head_dim): q, k, v before RoPE side by side; None unless the
            compressor asked for it with ``needs_before_rope``.
    """

    layer: int
    block: Block
    k: Tensor
    v: Tensor
    query: Tensor
    scale: float
    before_rope: Tensor | None = None
    softcap: float | None = None


class Compressor(ABC):
    """Scores the tokens of a block; the ``passing_length`` best per KV head are passed to later blocks."""

    name: ClassVar[str]
    needs_before_rope: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: BlockView) -> Tensor:
        """Scores (kv_heads, tokens), fp32, on the device of ``view.k``; higher means: pass it on."""


def pool(scores: Tensor) -> Tensor:
    """Max-pool (kernel 5, stride 1, padding 2) over the tokens of one block: a good token takes its neighbours along.

    In the reference code, not in the paper. ``scores`` and the result: (kv_heads, tokens).
    """
    return F.max_pool1d(scores.unsqueeze(0), kernel_size=5, stride=1, padding=2).squeeze(0)


def select(scores: Tensor, count: int, selectable: int) -> Tensor:
    """Indices (kv_heads, count), ascending, of the best of a block's last ``selectable`` tokens.

    The tokens before those stand in the anchor. Of equal scores (pooling makes many) the earlier token is taken, so
    that the choice depends on neither device nor kernel.
    """
    first = scores.shape[1] - selectable
    best = scores[:, first:].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return best.sort(dim=1).values + first


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``x`` (tokens, kv_heads, head_dim) at ``indices`` (kv_heads, count): (count, kv_heads, head_dim)."""
    return torch.gather(x, 0, indices.T.unsqueeze(-1).expand(-1, -1, x.shape[2]))
