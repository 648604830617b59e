"""Two partial attention results into one, in place, by Triton: each value is read once and written once."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of one head that a program takes.
_ROWS = 16


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """See :func:`apb.kernels.merge.merge_into`; tensors on an NVIDIA GPU, values of a head beside each other."""
    rows, heads, head_dim = out.shape
    padded = triton.next_power_of_2(head_dim)
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _merge_pair[(triton.cdiv(rows, _ROWS), heads)](
            out, lse, other, other_lse, rows, *out.stride()[:2], *lse.stride(), *other.stride()[:2],
            *other_lse.stride(), D=head_dim, BD=padded, BR=_ROWS, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _merge_pair(
    out, lse, other, other_lse, rows, out_row, out_head, lse_head, lse_row, other_row, other_head, other_lse_head,
    other_lse_row, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Some rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    dims = tl.arange(0, BD)
    there = row < rows
    at = lse + head * lse_head + row * lse_row
    a = tl.load(at, mask=there, other=float("-inf"))
    b = tl.load(other_lse + head * other_lse_head + row * other_lse_row, mask=there, other=float("-inf"))
    top = tl.maximum(a, b)
    # A row may have seen nothing: (-inf) - (-inf) would be nan.
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight, other_weight = tl.exp(a - shift), tl.exp(b - shift)
    total = weight + other_weight
    safe = tl.where(total > 0.0, total, 1.0)
    mask = there[:, None] & (dims < D)[None, :]
    place = out + row[:, None] * out_row + head * out_head + dims[None, :]
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(other + row[:, None] * other_row + head * other_head + dims[None, :], mask=mask, other=0.0)
    merged = (x * weight[:, None] + y.to(tl.float32) * other_weight[:, None]) / safe[:, None]
    tl.store(place, merged.to(out.dtype.element_ty), mask=mask)
    tl.store(at, tl.where(total > 0.0, shift + tl.log(safe), float("-inf")), mask=there)
