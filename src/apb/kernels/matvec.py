"""Linear layers of one row, the bulk of a decode step: bound by reading the weights, where GEMM libraries are slow.

At 4096 x 4096 in bf16 cuBLAS reads 2.5 TB/s of an H200's 4.3, and 1.1 with 1024 outputs; this kernel reads 3.2 and
1.8. It has nothing to tune, and compiles once per width.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launching import on_device_of

# Weights in a program's tile, and at most in one row of it: few rows per program keep the most loads in flight.
_TILE, _WIDEST = 4096, 2048
# Of :func:`gated`.
ACTIVATIONS = ("silu", "gelu_tanh")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """``torch.nn.functional.linear`` of a single row, accumulated in fp32, and its sum with another row.

    Args:
        x: (..., width), a single row: all leading dimensions are 1.
        weight: (outputs, width), rows contiguous, in x's dtype: fp32, bf16 or fp16; or float8_e4m3fn with scales.
        bias: (outputs,) or None.
        scale: (outputs,) fp32, factors of the weights' rows, or None.
        residual: (..., outputs) contiguous in x's dtype, added to the product after its rounding; or None.

    Returns:
        (..., outputs) in x's dtype.
    """
    outputs = weight.shape[0]
    out = x.new_empty(*x.shape[:-1], outputs)
    width, block_n, block_k = _tiles(weight)
    bias_at, scale_at, residual_at = (out if each is None else each for each in (bias, scale, residual))
    with on_device_of(x):
        _matvec[(triton.cdiv(outputs, block_n),)](
            x.reshape(-1), weight, bias_at, scale_at, residual_at, out, outputs, weight.stride(0), K=width, BN=block_n,
            BK=block_k, BIAS=bias is not None, SCALED=scale is not None, ADDED=residual is not None, num_warps=4,
        )  # fmt: skip
    return out


def several(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """:func:`linear` of one row by two or three layers of the same width, in one launch.

    Small layers alone leave most of a GPU idle, and every launch costs time to begin and to end.

    Args:
        x: as in :func:`linear`.
        weights: (outputs, width) each, of any numbers of outputs.
        biases: of each, all of them or none.

    Returns:
        (..., outputs) of each, views of one tensor.
    """
    counts = [weight.shape[0] for weight in weights]
    row = x.reshape(-1)
    out = row.new_empty(sum(counts))
    outs = list(out.split(counts))
    # A layer without outputs in place of a third.
    last = 2 if len(weights) > 2 else 0
    third = counts[2] if last else 0
    width, block_n, block_k = _tiles(weights[0])
    blocks = [triton.cdiv(count, block_n) for count in (*counts[:2], third)]
    with_bias = biases[0] is not None
    bias = [each if each is not None else out for each in biases]
    with on_device_of(x):
        _several[(sum(blocks),)](
            row, weights[0], weights[1], weights[last], bias[0], bias[1], bias[last], outs[0], outs[1], outs[last],
            counts[0], counts[1], third, weights[0].stride(0), weights[1].stride(0), weights[last].stride(0),
            blocks[0], blocks[0] + blocks[1], K=width, BN=block_n, BK=block_k, BIAS=with_bias, num_warps=4,
        )  # fmt: skip
    return [each.view(*x.shape[:-1], -1) for each in outs]


def gated(x: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``silu(linear(x, gate)) * linear(x, up)`` of one row, in one launch, rounded where separate layers round.

    Args:
        x: as in :func:`linear`.
        gate, up: (outputs, width) weights.
        activation: of :data:`ACTIVATIONS`: "silu", or "gelu_tanh", GELU by its approximation with tanh.

    Returns:
        (..., outputs) in x's dtype.
    """
    outputs = gate.shape[0]
    row = x.reshape(-1)
    out = row.new_empty(outputs)
    width, block_n, block_k = _tiles(gate)
    block_n = max(1, block_n // 2)  # two rows of weights for every output
    with on_device_of(x):
        _gated[(triton.cdiv(outputs, block_n),)](
            row, gate, up, out, outputs, gate.stride(0), up.stride(0), K=width, BN=block_n, BK=block_k,
            GELU=activation == "gelu_tanh", num_warps=4,
        )  # fmt: skip
    return out.view(*x.shape[:-1], -1)


def _tiles(weight: Tensor) -> tuple[int, int, int]:
    """The width of a layer, and the rows and columns of a program's tile."""
    width = weight.shape[1]
    block_k = min(_WIDEST, max(16, triton.next_power_of_2(width)))
    return width, _TILE // block_k, block_k


@triton.jit(do_not_specialize=["outputs"])
def _matvec(
    x, weight, bias, scale, residual, out, outputs, stride,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """BN outputs: their rows of weights times x."""
    _outputs(tl.program_id(0), x, weight, bias, scale, residual, out, outputs, stride, K, BN, BK, BIAS, SCALED, ADDED)


@triton.jit(do_not_specialize=["outputs0", "outputs1", "outputs2", "begin1", "begin2"])
def _several(
    x, weight0, weight1, weight2, bias0, bias1, bias2, out0, out1, out2, outputs0, outputs1, outputs2,
    stride0, stride1, stride2, begin1, begin2,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """BN outputs of one of three layers: of the second those of programs from ``begin1`` on, then of the third."""
    program = tl.program_id(0)
    if program < begin1:
        _outputs(program, x, weight0, bias0, out0, out0, out0, outputs0, stride0, K, BN, BK, BIAS, False, False)
    elif program < begin2:
        _outputs(
            program - begin1, x, weight1, bias1, out1, out1, out1, outputs1, stride1, K, BN, BK, BIAS, False, False
        )
    else:
        _outputs(
            program - begin2, x, weight2, bias2, out2, out2, out2, outputs2, stride2, K, BN, BK, BIAS, False, False
        )


@triton.jit
def _outputs(
    block, x, weight, bias, scale, residual, out, outputs, stride,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """A block of a layer's outputs."""
    output = block * BN + tl.arange(0, BN)
    total = tl.sum(_products(x, weight, output, outputs, stride, K, BN, BK), 1)
    if SCALED:
        total *= tl.load(scale + tl.minimum(output, outputs - 1))
    if BIAS:
        total += tl.load(bias + tl.minimum(output, outputs - 1)).to(tl.float32)
    if ADDED:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + tl.minimum(output, outputs - 1)).to(tl.float32)
    tl.store(out + output, total.to(out.dtype.element_ty), mask=output < outputs)


@triton.jit(do_not_specialize=["outputs"])
def _gated(
    x, gate, up, out, outputs, gate_stride, up_stride,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """BN outputs of the gate and of what it opens, multiplied."""
    output = tl.program_id(0) * BN + tl.arange(0, BN)
    dtype = out.dtype.element_ty
    # Both before either is summed up: a sum waits, and nothing would be loaded meanwhile.
    gates = _products(x, gate, output, outputs, gate_stride, K, BN, BK)
    values = _products(x, up, output, outputs, up_stride, K, BN, BK)
    opening = tl.sum(gates, 1).to(dtype).to(tl.float32)
    value = tl.sum(values, 1).to(dtype).to(tl.float32)
    exponent = opening
    if GELU:  # x / (1 + exp(-2 y)) is x (1 + tanh(y)) / 2
        exponent = 1.5957691216057308 * (opening + 0.044715 * opening * opening * opening)
    opened = (opening / (1.0 + tl.exp(-exponent))).to(dtype).to(tl.float32)
    tl.store(out + output, (opened * value).to(dtype), mask=output < outputs)


@triton.jit
def _products(x, weight, output, outputs, stride, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Rows of weights times x, to be summed up over the columns: (BN, BK) fp32."""
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
    return acc
