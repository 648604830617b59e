"""The interface of compressors: a score for every token of a block, per KV head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..planning.options import Checked
from ..planning.plan import Block
from ..planning.shape import ModelShape

if TYPE_CHECKING:  # a compressor can be named, and its cost asked, without torch
    from torch import Tensor

    from .retaining import Head


@dataclass(frozen=True)
class BlockView:
    """One block in one layer, as a compressor sees it.

    Attributes:
        layer: index of the layer.
        block: the block, with its true positions.
        k, v: (tokens, kv_heads, head_dim), keys after RoPE.
        q: (tokens, heads, head_dim), the block's own query rows after RoPE.
        query: (query tokens, heads, head_dim), the true query rows after RoPE, at their true positions.
        scale: the layer's factor on q.k.
        passed: key/value pairs that the block passes on, per KV head.
        softcap: cap of the layer's logits; None without one.
        lse: (heads, query tokens) fp32, log-sum-exps of the query rows' logits over the whole text of the first round
            and the query; None unless ``passing_budget`` makes pairs of different blocks compete.
        before_rope: (tokens, (heads + 2 kv_heads) * head_dim): q, k, v before RoPE side by side; None unless the
            compressor asked for it with ``needs_before_rope``.
    """

    layer: int
    block: Block
    k: Tensor
    v: Tensor
    q: Tensor
    query: Tensor
    scale: float
    passed: int
    before_rope: Tensor | None = None
    softcap: float | None = None
    lse: Tensor | None = None


@dataclass(frozen=True)
class Compressor(Checked, ABC):
    """Scores the tokens of a block; the ``passing_length`` best per KV head are passed to later blocks.

    Subclasses are frozen dataclasses whose fields, made by :func:`apb.planning.options.option`, are their options.

    Attributes:
        name: what ``--compressor`` and results call it.
        needs_before_rope: True if it scores with q, k, v before RoPE.
        pooled: True if the scores are max-pooled inside the block before the best are chosen (kernel 5).
        comparable: True if :meth:`compare` gives scores that compare over blocks, which ``passing_budget`` needs.
    """

    name: ClassVar[str]
    needs_before_rope: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    comparable: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # What a parent computes for several blocks at once is not what a child's own scores are.
        for each, every in (("score", "score_all"), ("compare", "compare_all")):
            if each in vars(cls) and every not in vars(cls):
                setattr(cls, every, getattr(Compressor, every))

    @abstractmethod
    def score(self, view: BlockView) -> Tensor:
        """Scores (kv_heads, tokens), fp32, on the device of ``view.k``, not pooled; higher means: pass it on."""

    def score_all(self, views: Sequence[BlockView]) -> list[Tensor]:
        """:meth:`score` of several blocks of one layer, (kv_heads, tokens) fp32 each, in the order of the text.

        A subclass may override it beside :meth:`score`, to launch less.
        """
        return [self.score(view) for view in views]

    @abstractmethod
    def flops(self, model: ModelShape, query: int) -> int:
        """FLOPs to score one token in one layer, for all KV heads, with ``query`` query rows."""

    def compare(self, view: BlockView, scores: Tensor) -> Tensor:
        """Scores like those of :meth:`score`, which are given, but comparable with those of other blocks."""
        return scores

    def compare_all(self, views: Sequence[BlockView], scores: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`compare` of several blocks, as :meth:`score_all` scores them."""
        return [self.compare(view, own) for view, own in zip(views, scores, strict=True)]

    def flops_to_compare(self, model: ModelShape, query: int) -> int:
        """FLOPs of :meth:`compare`, as :meth:`flops` counts them."""
        return 0

    def edge(self, passed: int) -> int:
        """Pairs at a block's end, of so many that it passes on, that the next block sees whatever their scores."""
        return 0

    def loaded(self, read: Callable[[str | Path], Sequence[Head]]) -> Compressor:
        """This compressor ready for one model; ``read`` loads a file of retaining heads that fit the model."""
        return self
