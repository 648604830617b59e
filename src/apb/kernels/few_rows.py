"""RMS norms and RoPE of few rows, in plain Triton: one launch each, in a decode step that is made of hundreds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import on_device_of
from .norm import RowNorm


def rms_norm(x: Tensor, norm: RowNorm) -> Tensor:
    """:meth:`RowNorm.of` of rows (..., width), contiguous, in fp32, bf16 or fp16."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    with on_device_of(x):
        _rms_norm[(x.numel() // width,)](
            x, norm.weight, out, norm.eps, W=width, BW=triton.next_power_of_2(width), OFFSET=norm.offset,
            ROUNDED=norm.rounded,             num_warps=8 if width > 1024 else 1,
        )  # fmt: skip
    return out


def rotate_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE (Su et al., 2021) of queries and keys, whose first and second halves are pairs, in fp32.

    Args:
        q, k: (1, heads, rows, head_dim) each, any strides but the last, which is 1.
        cos, sin: (1, rows, head_dim), contiguous.

    Returns:
        rotated q and k, (1, heads, rows, head_dim), contiguous.
    """
    _, heads, rows, width = q.shape
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    with on_device_of(q):
        _rotate_halves[(heads + k.shape[1], rows)](
            q, k, cos, sin, *outs, *q.stride()[1:3], *k.stride()[1:3], heads, rows,
            W=width, BH=triton.next_power_of_2(width // 2), num_warps=1,
        )  # fmt: skip
    return outs


@triton.jit
def by_weight(x, weight, OFFSET: tl.constexpr, ROUNDED: tl.constexpr, dtype: tl.constexpr):
    """Columns of a row that was divided by its root mean square, in fp32, times their factors, in ``dtype``."""
    if ROUNDED:
        x = x.to(dtype).to(tl.float32)
    factors = weight.to(tl.float32)
    if OFFSET:
        factors += 1.0
    return (x * factors).to(dtype)


@triton.jit
def _rms_norm(
    x, weight, out, eps, W: tl.constexpr, BW: tl.constexpr, OFFSET: tl.constexpr, ROUNDED: tl.constexpr
):  # fmt: skip
    """One row."""
    at = tl.program_id(0).to(tl.int64) * W
    cols = tl.arange(0, BW)
    row = tl.load(x + at + cols, mask=cols < W, other=0.0).to(tl.float32)
    factors = tl.load(weight + cols, mask=cols < W, other=0.0)
    row *= tl.rsqrt(tl.sum(row * row, 0) / W + eps)
    tl.store(out + at + cols, by_weight(row, factors, OFFSET, ROUNDED, out.dtype.element_ty), mask=cols < W)


@triton.jit(do_not_specialize=["heads", "rows"])
def _rotate_halves(
    q, k, cos, sin, q_out, k_out, q_head, q_row, k_head, k_row, heads, rows, W: tl.constexpr, BH: tl.constexpr
):
    """One row of one head, of the queries or, from ``heads`` on, of the keys."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    if head < heads:
        _rotate(q + head * q_head + row * q_row, q_out + (head * rows + row) * W, cos + row * W, sin + row * W, W, BH)
    else:
        head -= heads
        _rotate(k + head * k_head + row * k_row, k_out + (head * rows + row) * W, cos + row * W, sin + row * W, W, BH)


@triton.jit
def _rotate(x, out, cos, sin, W: tl.constexpr, BH: tl.constexpr):
    half: tl.constexpr = W // 2
    cols = tl.arange(0, BH)
    there = cols < half
    first = tl.load(x + cols, mask=there, other=0.0).to(tl.float32)
    second = tl.load(x + half + cols, mask=there, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + cols, mask=there, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + half + cols, mask=there, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + cols, mask=there, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + half + cols, mask=there, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    tl.store(out + cols, (first * cos_first - second * sin_first).to(dtype), mask=there)
    tl.store(out + half + cols, (second * cos_second + first * sin_second).to(dtype), mask=there)
