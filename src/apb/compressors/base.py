"""Interface of compressors: a score for every token of a block, per KV head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..plan import Block


@dataclass(frozen=True)
class BlockView:
    """A compressor's input: one block in one layer.

    Attributes:
        layer: index of the layer.
        block: the block, with its true positions.
        k, v: (tokens, kv_heads, head_dim), keys after RoPE.
        query: (query tokens, heads, head_dim), the true query rows after RoPE, at their true positions.
        scale: the layer's factor on q.k.
        passed: number of key/value pairs that the block passes on, per KV head.
        softcap: the layer's cap on its logits; None without one.
        before_rope: (tokens, (heads + 2 kv_heads) * head_dim), q, k and v before RoPE, concatenated; None unless the
            compressor sets ``needs_before_rope``.
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
    """Scores the tokens of a block; the ``passing_length`` highest per KV head are passed on to later blocks.

    Attributes:
        name: the name on the command line.
        needs_before_rope: the engine provides :attr:`BlockView.before_rope`.
        pooled: scores are max-pooled before the top tokens are chosen (:func:`apb.kernels.selection.pool`).
    """

    name: ClassVar[str]
    needs_before_rope: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: BlockView) -> Tensor:
        """Scores (kv_heads, tokens), fp32, on the device of ``view.k``, before pooling; the highest are passed on."""
