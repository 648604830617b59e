"""Attention through torch's own fused kernels.

Flash on the CPU; on GPUs cuDNN from Hopper on, flash before Hopper, and the memory-efficient kernel for fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .merge import merge
from .segment import Segment

_aten = torch.ops.aten


def attention(q: Tensor, segments: list[Segment], scale: float) -> tuple[Tensor, Tensor]:
    """:func:`apb.attention` with one kernel call per segment, or two for a causal one with more keys than rows."""
    rows, heads, head_dim = q.shape
    outs, lses = [], []
    for segment in segments:
        for first, k, v, causal in _square(rows, segment):
            out, lse = _call(q[first:], k, v, causal, scale)
            if first:
                out = torch.cat([out.new_zeros(first, heads, head_dim), out])
                lse = torch.cat([lse.new_full((heads, first), float("-inf")), lse], 1)
            outs.append(out)
            lses.append(lse)
    if not outs:
        return torch.zeros_like(q), q.new_full((heads, rows), float("-inf"), dtype=torch.float32)
    if len(outs) == 1:
        return outs[0], lses[0]
    out, lse = merge(outs, lses)
    return out.to(q.dtype), lse


def _square(rows: int, segment: Segment) -> list[tuple[int, Tensor, Tensor, bool]]:
    """Split a segment into calls the kernels support: unmasked, or causal with as many rows as keys.

    Each item is (first row of the call, k, v, causal). Empty calls are left out: the kernels refuse zero keys.
    """
    k, v, keys = segment.k, segment.v, segment.k.shape[0]
    if not keys or not rows:
        return []
    if not segment.causal or rows == 1:  # the only row is the last one, which sees all
        return [(0, k, v, False)]
    before = keys - rows
    if before <= 0:  # bottom-right alignment: the first -before rows see nothing
        return [(-before, k, v, keys > 1)]
    return [(0, k[:before], v[:before], False), (0, k[before:], v[before:], rows > 1)]


def _call(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    # The kernels take (1, heads, rows, head_dim), with possibly fewer KV heads than query heads, and any strides but
    # the last, which must be 1; not all of them check that. Some also return the lse of padding rows, or as a column:
    # (1, heads, >= rows[, 1]).
    q4, k4, v4 = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q4, k4, v4, 0.0, causal, scale=scale)
    elif q.dtype == torch.float32:
        # This kernel does not support grouped heads: repeat keys and values.
        k4, v4 = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k4, v4))
        out, lse = _aten._scaled_dot_product_efficient_attention(q4, k4, v4, None, True, 0.0, causal, scale=scale)[:2]
    elif _cudnn(q):
        out, lse = _aten._scaled_dot_product_cudnn_attention(q4, k4, v4, None, True, 0.0, causal, scale=scale)[:2]
    else:
        out, lse = _aten._scaled_dot_product_flash_attention(q4, k4, v4, 0.0, causal, scale=scale)[:2]
    return out[0].transpose(0, 1), lse.reshape(q.shape[1], -1)[:, : q.shape[0]].float()


def _cudnn(q: Tensor) -> bool:
    return torch.cuda.get_device_capability(q.device)[0] >= 9 and torch.backends.cudnn.is_available()


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Reason this back-end cannot serve such tensors, or None if it can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device type {device.type} has no fused attention that returns its log-sum-exp"
    if dtype == torch.float64:
        return "fused attention on GPUs takes bfloat16, float16 or float32, not float64"
    if head_dim % 8 or head_dim > 256:
        return f"fused attention on GPUs takes head dims that are multiples of 8 up to 256, not {head_dim}"
    return None
