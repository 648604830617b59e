"""What a compressor is: a score for every token of a block, per KV head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..planning.plan import Block


@dataclass(frozen=True)
class BlockView:
    """What a compressor may look at: one block in one layer.

    Attributes:
        layer: index of the layer.
        block: the block, with its true positions.
        k, v: (tokens, kv_heads, head_dim), keys after RoPE.
        query: (query tokens, heads, head_dim), the true query rows after RoPE, at their true positions.
        scale: the layer's factor on q.k.
        passed: key/value pairs that the block passes on, per KV head.
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
    passed: int
    before_rope: Tensor | None = None
    softcap: float | None = None


class Compressor(ABC):
    """Scores the tokens of a block; the ``passing_length`` best per KV head are passed to later blocks."""

    name: ClassVar[str]
    needs_before_rope: ClassVar[bool] = False
    # Whether the scores are max-pooled before the best are chosen (apb.kernels.selection.pool).
    pooled: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: BlockView) -> Tensor:
        """Scores (kv_heads, tokens), fp32, on the device of ``view.k``, not pooled; higher means: pass it on."""
