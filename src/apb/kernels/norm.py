"""What an RMS norm computes, for the kernels that compute it beside something else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowNorm(NamedTuple):
    """Rows by their root mean square, in fp32 (Zhang and Sennrich, 2019).

    Attributes:
        weight: (width,), factors of the columns, in the dtype of the rows.
        eps: added to the mean square.
        offset: the factors are 1 + weight (Gemma).
        rounded: rows are rounded to their dtype before they are multiplied by the factors, not only afterwards.
    """

    weight: Tensor
    eps: float
    offset: bool
    rounded: bool

    def of(self, x: Tensor) -> Tensor:
        """Rows (..., width) normed, by torch; x's shape and dtype."""
        rows = x.float()
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        if self.rounded:
            rows = rows.to(x.dtype).float()
        factors = self.weight.float()
        return ((1 + factors if self.offset else factors) * rows).to(x.dtype)
