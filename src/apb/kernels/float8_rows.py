"""Rows rounded to fp8 by Triton: read once, written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import on_device_of


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`apb.kernels.float8.scaled`; x is on a GPU that has fp8, its rows contiguous or not."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    rounded, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(rows, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    with on_device_of(x):
        _scaled[(rows,)](x, rounded, scale, x.stride(0), rounded.stride(0), WIDTH=width, BLOCK=block, num_warps=warps)
    return rounded, scale


@triton.jit
def _scaled(x, rounded, scale, stride, stride_rounded, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    own = tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 1.1754943508222875e-38)
    tl.store(scale + row, own)
    values = tl.minimum(tl.maximum(values / own, -448.0), 448.0)
    tl.store(rounded + row * stride_rounded + cols, values.to(tl.float8e4nv), mask=cols < WIDTH)
