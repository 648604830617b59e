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


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Add a partial result over other keys to one, in place; on NVIDIA GPUs in one launch, without copies in fp32.

    Args:
        out: (rows, heads, head_dim), any floating dtype, to which the merged result is rounded.
        lse: (heads, rows) fp32, as in :func:`merge`.
        other, other_lse: the other part; a row that sees no key of it has finite values and the lse -inf.
    """
    if _by_triton(out) and out.stride(2) == other.stride(2) == 1:
        from . import merging

        merging.merge_into(out, lse, other, other_lse)
        return
    merged, total = merge((out, other), (lse, other_lse))
    out.copy_(merged)
    lse.copy_(total)


def pack(out: Tensor, lse: Tensor) -> Tensor:
    """A partial result as one message, (rows, heads, head_dim + 1) fp32: the output with its log-sum-exp beside it.

    Args:
        out: (rows, heads, head_dim).
        lse: (heads, rows) fp32. Where a kernel wrote both into one such tensor, that is the message, without a copy.
    """
    rows, heads, head_dim = out.shape
    row = heads * (head_dim + 1), head_dim + 1
    beside = out.dtype == lse.dtype and lse.data_ptr() == out.data_ptr() + head_dim * out.element_size()
    if beside and out.stride() == (*row, 1) and lse.stride() == row[::-1]:
        return out.as_strided((rows, heads, head_dim + 1), (*row, 1))
    return torch.cat([out.float(), lse.T.unsqueeze(-1)], -1)


def merge_packed(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`merge` of messages, on NVIDIA GPUs in one launch.

    Args:
        packed: (parts, rows, heads, head_dim + 1) fp32, as :func:`pack` makes them.
        dtype: in which a GPU gives ``out``; elsewhere it is fp32.

    Returns:
        out (rows, heads, head_dim) and lse (heads, rows) fp32.
    """
    if _by_triton(packed):
        from . import merging

        return merging.merge(packed, dtype)
    return merge(packed[..., :-1].unbind(0), packed[..., -1].transpose(1, 2).unbind(0))


def _by_triton(x: Tensor) -> bool:
    from .fused import why_no_triton  # which merges too

    return x.is_cuda and why_no_triton() is None
