"""What an RMS norm computes, for the kernels that compute it beside something else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowNorm(NamedTuple):
    """Rows by their root mean square (Zhang and Sennrich, 2019), in fp32, rounded where transformers rounds.

    Attributes:
        weight: (width,), factors of the columns, in the dtype of the rows.
        eps: added to the mean square.
        offset: the factors are 1 + weight, and the product alone is rounded (Gemma); else rows are rounded before.
    """

    weight: Tensor
    eps: float
    offset: bool

    def of(self, x: Tensor) -> Tensor:
        """Rows (..., width) normed, by torch; x's shape and dtype."""
        rows = x.float()
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (rows * (1 + self.weight.float())).to(x.dtype)
        return self.weight * rows.to(x.dtype)
