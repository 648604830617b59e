"""The one attention operation that all strategies and decode call, and the choice of its back-end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from . import fused, reference, sdpa
from .fused import Part, Task
from .segment import Segment

__all__ = ["BACKENDS", "Part", "Segment", "Task", "attention", "batched_attention", "choose"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BACKENDS = {"reference": reference.attention, "torch": sdpa.attention, "fused": fused.attention}
_WHY_NOT = {"torch": sdpa.why_not, "fused": fused.why_not}


def attention(
    q: Tensor,
    segments: Sequence[Segment],
    scale: float | None = None,
    backend: str = "auto",
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the rows ``q`` over the union of several key/value segments.

    Args:
        q: (rows, heads, head_dim), bf16, fp16, fp32 or fp64; any strides.
        segments: :class:`Segment` with k, v (keys, kv_heads, head_dim) of q's dtype and device; kv_heads divides heads
            (grouped queries: head h reads KV head h // (heads / kv_heads)). May be empty, and may hold zero keys.
        scale: factor on q.k before the softmax; 1 / sqrt(head_dim) if None.
        backend: "reference" (fp32 matrices), "torch" (torch's fused kernels), "fused" (this package's: one launch for
            all segments, on NVIDIA GPUs) or "auto".
        softcap: c, where logits x become c * tanh(x / c) before the softmax (Gemma 2, arXiv 2408.00118).

    Returns:
        out: (rows, heads, head_dim) in q's dtype; 0 in a row that sees no key.
        lse: (heads, rows) fp32, the natural log of the sum of exponentials; -inf in a row that sees no key.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together, or a back-end that cannot serve them.

    >>> import torch, apb
    >>> q, k, v = (torch.randn(n, h, 64) for n, h in ((5, 4), (9, 2), (9, 2)))
    >>> out, lse = apb.attention(q, [apb.Segment(k, v, causal=True)])
    >>> out.shape, lse.shape
    (torch.Size([5, 4, 64]), torch.Size([4, 5]))
    """
    segments = list(segments)
    _check(q, segments)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if scale <= 0:  # kernels mask logits, or take their maximum, before scaling, which needs a positive factor
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    name, _ = choose(backend, q.device, q.dtype, q.shape[-1], softcap)
    if softcap is not None:
        return (fused if name == "fused" else reference).attention(q, segments, scale, softcap)
    return BACKENDS[name](q, segments, scale)


def batched_attention(
    q: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    tasks: Sequence[Task],
    scale: float,
    out: Tensor,
    backend: str = "auto",
    lse: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Several runs of rows over parts of shared keys and values, written into ``out``: one launch where a kernel can.

    Args:
        q: (rows, heads, head_dim).
        sources: up to three pairs k, v (keys, kv_heads, head_dim).
        tasks: rows, and the parts of the sources that they see; rows without a task are unchanged in ``out``.
        scale: positive factor on q.k.
        out: (rows, heads, head_dim), of q's dtype, contiguous in its last dimension.
        backend: as in :func:`attention`.
        lse: (heads, rows) fp32, contiguous, for the log-sum-exps; None if they are not needed.
        softcap: as in :func:`attention`.
    """
    if choose(backend, q.device, q.dtype, q.shape[2], softcap)[0] == "fused":
        lse = q.new_empty(q.shape[1], len(q), dtype=torch.float32) if lse is None else lse
        fused.launch(q, sources, tuple(tasks), scale, out, lse, softcap=softcap)
        return
    for task in tasks:
        rows, segments = slice(task.start, task.stop), []
        for part in task.parts:
            k, v = (x[part.first : part.first + part.keys] for x in sources[part.source])
            segments.append(Segment(k, v, part.causal))
        out[rows], each = attention(q[rows], segments, scale, backend, softcap)
        if lse is not None:
            lse[:, rows] = each


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None = None
) -> tuple[str, str]:
    """(name, reason) of the back-end for such tensors; InputError if the one asked for cannot be used."""
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"Unknown attention back-end {backend!r}; choose one of auto, {', '.join(BACKENDS)}.")
    if softcap is not None and backend in ("auto", "reference"):
        return "reference", "torch's kernels do not cap logits"
    obstacle = _WHY_NOT[backend](device, dtype, head_dim) if backend in _WHY_NOT else None
    if softcap is not None and backend == "torch":
        obstacle = "it does not cap logits"
    if obstacle:
        raise InputError(f"The attention back-end {backend!r} cannot be used here: {obstacle}; choose 'reference'.")
    if backend != "auto":
        return backend, "asked for"
    if not fused.why_not_hopper(device, dtype, head_dim):
        return "fused", "one launch for all segments, written for Hopper"
    if obstacle := sdpa.why_not(device, dtype, head_dim):
        return "reference", obstacle
    return "torch", f"torch's fused attention serves {device.type} in {str(dtype).removeprefix('torch.')}"


def _check(q: Tensor, segments: list[Segment]) -> None:
    if q.dim() != 3:
        raise InputError(f"q must be (rows, heads, head_dim), not {tuple(q.shape)}.")
    if q.dtype not in DTYPES:
        raise InputError(f"q, k and v must be floating-point numbers of 16 bits or more, not {q.dtype}.")
    _, heads, head_dim = q.shape
    for number, segment in enumerate(segments):
        k, v = segment.k, segment.v
        if k.dim() != 3 or k.shape != v.shape:
            raise InputError(
                f"Segment {number}: k and v must both be (keys, kv_heads, head_dim), "
                f"not {tuple(k.shape)} and {tuple(v.shape)}."
            )
        if k.shape[2] != head_dim or k.shape[1] == 0 or heads % k.shape[1]:
            raise InputError(
                f"Segment {number}: {k.shape[1]} KV heads of {k.shape[2]} do not serve "
                f"{heads} query heads of {head_dim}."
            )
        if {k.dtype, v.dtype, q.dtype} != {q.dtype} or {k.device, v.device, q.device} != {q.device}:
            raise InputError(
                f"Segment {number}: q, k and v must share dtype and device, "
                f"not {q.dtype}/{q.device}, {k.dtype}/{k.device} and {v.dtype}/{v.device}."
            )
