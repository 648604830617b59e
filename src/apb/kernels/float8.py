"""Linear layers whose weights and activations are fp8 (e4m3), scaled by rows: twice the rate of bf16 on Hopper.

Every output's weights have one scale, and so has every row of activations, which are rounded as they come. Products are
summed in fp32, and scaled afterwards. A single row, as in decode, is not rounded: there it is reading the weights that
takes the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from .fused import why_no_triton
from .launching import on_device_of

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
# The products of GPUs take widths that are multiples of this.
MULTIPLE = 16
# Elements of a row that a program rounds at once.
_WIDEST = 16384


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to fp8, and their scales: x is about ``rounded * scale[:, None]``.

    Args:
        x: (rows, width) fp32, fp16 or bf16.

    Returns:
        (rows, width) float8_e4m3fn, and (rows,) fp32.
    """
    if x.is_cuda and x.shape[1] <= _WIDEST and why_no_triton() is None:
        from . import float8_rows

        return float8_rows.scaled(x)
    scale = (x.abs().amax(1).float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(DTYPE), scale


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` with weights in fp8.

    Args:
        x: (..., width) bf16.
        weight: (outputs, width) float8_e4m3fn; both are multiples of :data:`MULTIPLE`.
        scale: (outputs,) fp32, of the weights.
        bias: (outputs,) in x's dtype, or None.

    Returns:
        (..., outputs) in x's dtype.
    """
    # Compilers need an opaque operator; without one, going through the dispatcher would only cost time.
    call = torch.ops.apb.float8_linear if torch.compiler.is_compiling() else _product
    out: Tensor = call(x.reshape(-1, x.shape[-1]), weight, scale, bias)
    return out.view(*x.shape[:-1], -1)


def _product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda and len(x) == 1 and why_no_triton() is None:
        from . import matvec

        return matvec.linear(x, weight, bias, scale)
    rounded, by_row = scaled(x)
    with on_device_of(x):
        out = torch._scaled_mm(
            rounded,
            weight.t(),
            scale_a=by_row[:, None],
            scale_b=scale[None],
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
    return out if bias is None else out.add_(bias)


_operator = library.custom_op("apb::float8_linear", _product, mutates_args=())


@_operator.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), weight.shape[0])
