"""A linear layer of one row, the bulk of a decode step: bound by reading the weights, where GEMM libraries are slow.

At 4096 x 4096 in bf16 cuBLAS reads 2.5 TB/s of an H200's 4.3, and 1.1 with 1024 outputs; this kernel reads 3.2 and
1.8. It has nothing to tune, and compiles once per width.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor, library

# Weights in a program's tile, and at most in one row of it: few rows per program keep the most loads in flight.
_TILE, _WIDEST = 4096, 2048


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """``torch.nn.functional.linear`` of a single row, accumulated in fp32.

    Args:
        x: (..., width), a single row: all leading dimensions are 1.
        weight: (outputs, width), rows contiguous, in x's dtype: fp32, bf16 or fp16; or float8_e4m3fn with scales.
        bias: (outputs,) or None.
        scale: (outputs,) fp32, factors of the weights' rows, or None.
        into: (outputs,) contiguous, of x's dtype, where the result is written; in new memory if None. Not in what is
            compiled.

    Returns:
        (..., outputs) in x's dtype.
    """
    if into is not None:
        return _launch(x.reshape(-1), weight, bias, scale, into).view(*x.shape[:-1], -1)
    # Compilers need an opaque operator; without one, going through the dispatcher would only cost time.
    call = torch.ops.apb.matvec if torch.compiler.is_compiling() else _launch
    out: Tensor = call(x.reshape(-1), weight, bias, scale)
    return out.view(*x.shape[:-1], -1)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    outputs, width = weight.shape
    out = x.new_empty(outputs) if into is None else into
    block_k = min(_WIDEST, max(16, triton.next_power_of_2(width)))
    block_n = _TILE // block_k
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _matvec[(triton.cdiv(outputs, block_n),)](
            x, weight, out if bias is None else bias, out if scale is None else scale, out, outputs, weight.stride(0),
            K=width, BN=block_n, BK=block_k, BIAS=bias is not None, SCALED=scale is not None, num_warps=4,
        )  # fmt: skip
    return out


@library.custom_op("apb::matvec", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    return _launch(x, weight, bias, scale)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    return x.new_empty(weight.shape[0])


@triton.jit(do_not_specialize=["outputs"])
def _matvec(
    x, weight, bias, scale, out, outputs, stride,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """BN outputs: their rows of weights times x."""
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BK)
    # Rows past the end read the last row again, which saves a mask.
    row = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * stride + cols[None, :]
    acc = tl.zeros([BN, BK], tl.float32)
    for k in tl.static_range(0, K, BK):
        if k + BK <= K:
            near, far = tl.load(x + k + cols), tl.load(row + k)
        else:
            near = tl.load(x + k + cols, mask=k + cols < K, other=0.0)
            far = tl.load(row + k, mask=(k + cols < K)[None, :], other=0.0)
        acc += far.to(tl.float32) * near.to(tl.float32)[None, :]
    total = tl.sum(acc, 1)
    if SCALED:
        total *= tl.load(scale + tl.minimum(output, outputs - 1))
    if BIAS:
        total += tl.load(bias + tl.minimum(output, outputs - 1)).to(tl.float32)
    tl.store(out + output, total.to(out.dtype.element_ty), mask=output < outputs)
