"""Partial attention results merged by log-sum-exp, in plain Triton: each value is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import on_device_of

# Rows of one head that a program takes where two parts are merged in place.
_ROWS = 16


def merge(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`apb.kernels.merge.merge`, in one launch.

    Args:
        packed: (parts, rows, heads, head_dim + 1) fp32: each part's output, and at the end its log-sum-exp.
        dtype: of the result.

    Returns:
        out (rows, heads, head_dim) in that dtype, and lse (heads, rows) fp32.
    """
    _, rows, heads, width = packed.shape
    out = packed.new_empty(rows, heads, width - 1, dtype=dtype)
    lse = packed.new_empty(heads, rows)
    launch_merge(packed[..., :-1], packed[..., -1], out, lse.T)
    return out, lse


def launch_merge(parts: Tensor, sums: Tensor, out: Tensor, lse: Tensor) -> None:
    """Parts (parts, rows, heads, head_dim) and their sums (parts, rows, heads) into out and lse (rows, heads)."""
    count, rows, heads, head_dim = parts.shape
    with on_device_of(out):
        _merge[(rows, heads)](
            parts, sums, out, lse, count, *parts.stride()[:3], *sums.stride(), *out.stride()[:2], *lse.stride(),
            D=head_dim, BD=padded(head_dim), BS=max(2, 1 << (count - 1).bit_length()), num_warps=4,
        )  # fmt: skip


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """See :func:`apb.kernels.merge.merge_into`; tensors on an NVIDIA GPU, values of a head beside each other."""
    rows, heads, head_dim = out.shape
    with on_device_of(out):
        _merge_pair[(triton.cdiv(rows, _ROWS), heads)](
            out, lse, other, other_lse, rows, *out.stride()[:2], *lse.stride(), *other.stride()[:2],
            *other_lse.stride(), D=head_dim, BD=padded(head_dim), BR=_ROWS, num_warps=4,
        )  # fmt: skip


def padded(head_dim: int) -> int:
    """Columns of a tile: products want a power of two, and at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


@triton.jit(do_not_specialize=["splits"])
def _merge(
    parts, sums, out, lse, splits, part, part_row, part_head, sum_part, sum_row, sum_head, out_row, out_head,
    lse_row, lse_head, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One row of one head: its parts, weighted by their share of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    which = tl.arange(0, BS)
    dims = tl.arange(0, BD)
    each = tl.load(sums + which * sum_part + row * sum_row + head * sum_head, mask=which < splits, other=float("-inf"))
    top = tl.max(each, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(each - top)
    total = tl.sum(weights, 0)
    safe = tl.where(total > 0.0, total, 1.0)
    at = which.to(tl.int64) * part + row * part_row + head * part_head
    x = tl.load(parts + at[:, None] + dims[None, :], mask=(which < splits)[:, None] & (dims < D)[None, :], other=0.0)
    mixed = tl.sum(x * weights[:, None], 0) / safe
    tl.store(out + row * out_row + head * out_head + dims, mixed.to(out.dtype.element_ty), mask=dims < D)
    tl.store(lse + row * lse_row + head * lse_head, tl.where(total > 0.0, top + tl.log(safe), float("-inf")))


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
