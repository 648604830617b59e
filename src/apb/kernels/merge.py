"""Merging partial attention results by log-sum-exp, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys into attention over their union.

    Args:
        outs: one (rows, heads, head_dim) tensor per part, any floating dtype, each normalised over its own keys.
        lses: one (heads, rows) fp32 tensor per part: natural log of the sum of exponentials, -inf if a row sees no
            key of the part.

    Returns:
        out (rows, heads, head_dim) fp32 and lse (heads, rows) fp32. A row without any key is 0 with lse -inf.
    """
    total = torch.logsumexp(torch.stack(tuple(lses)), 0)
    # (-inf) - (-inf) would be nan in a row without any key: shift by 0 there, so that its weights are exp(-inf) = 0.
    shift = total.masked_fill(total.isneginf(), 0.0)
    parts = (out.float() * (lse - shift).exp().T.unsqueeze(-1) for out, lse in zip(outs, lses, strict=True))
    merged = next(parts)
    for part in parts:
        merged += part
        del part  # else it would be alive while the next one is computed
    return merged, total
