"""Trained scores: one small network a layer, the retaining heads of Locret (arXiv 2410.01805) that APB uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..planning.options import option
from ..planning.shape import ModelShape
from .base import BlockView, Compressor

if TYPE_CHECKING:
    from torch import Tensor

# Width of the paper's heads: what a file of heads is taken for until it is read.
HIDDEN = 1024


@dataclass(frozen=True)
class Head:
    """The retaining head of one layer: fc1 (hidden, (heads + 2 kv_heads) * head_dim), fc2 (kv_heads, hidden)."""

    fc1: Tensor
    fc2: Tensor

    def __call__(self, qkv: Tensor) -> Tensor:
        """fc2(silu(fc1([q; k; v]))) for (tokens, features): (kv_heads, tokens) fp32."""
        import torch.nn.functional as F

        return F.linear(F.silu(F.linear(qkv, self.fc1)), self.fc2).T.float()


@dataclass(frozen=True)
class Retaining(Compressor):
    """Scores by retaining heads from q, k, v before RoPE, max-pooled.

    ``heads`` is a file, which an engine reads for its model, or one :class:`Head` a layer.
    """

    name: ClassVar[str] = "retaining"
    needs_before_rope: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    heads: str | Path | Sequence[Head] = option("", "File of trained retaining heads.", kind=Path)

    def score(self, view: BlockView) -> Tensor:
        """See :meth:`Compressor.score`."""
        assert not isinstance(self.heads, (str, Path)), "an engine loads the heads before it reads"
        assert view.before_rope is not None, "the engine provides it because needs_before_rope is set"
        return self.heads[view.layer](view.before_rope)

    def flops(self, model: ModelShape, query: int) -> int:
        """See :meth:`Compressor.flops`: both linear maps of a head."""
        hidden = HIDDEN if isinstance(self.heads, (str, Path)) else len(self.heads[0].fc1)
        return 2 * hidden * ((model.heads + 2 * model.kv_heads) * model.head_dim + model.kv_heads)

    def loaded(self, read: Callable[[str | Path], Sequence[Head]]) -> Compressor:
        """See :meth:`Compressor.loaded`."""
        return replace(self, heads=read(self.heads)) if isinstance(self.heads, (str, Path)) else self
