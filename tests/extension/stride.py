"""A compressor that the package does not know: every so many tokens of a block are passed on first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apb.compressors import BlockView, Compressor
from apb.methods import option
from apb.planning.shape import ModelShape


@dataclass(frozen=True)
class Stride(Compressor):
    """Tokens at multiples of ``step`` score 1, the others 0; of equal ones the earlier is taken."""

    name: ClassVar[str] = "stride"

    step: int = option(4, "Distance between the tokens that are passed on.", least=1)

    def score(self, view: BlockView) -> Tensor:
        tokens, kv_heads, _ = view.k.shape
        return (torch.arange(tokens) % self.step == 0).float().expand(kv_heads, tokens)

    def flops(self, model: ModelShape, query: int) -> int:
        return model.kv_heads
