"""The kernels that ``apb bench attention`` compares: each builds a call from q and segments, or raises the reason."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import fused, reference, sdpa
from ..kernels.fused import Part, Task
from ..kernels.merge import merge
from ..kernels.segment import Segment

# (out, lse) as returned by apb.attention.
Result = tuple[Tensor, Tensor]


def _fused(kernel: str) -> Callable[[Tensor, list[Segment]], Callable[[], Result]]:
    def make(q: Tensor, segments: list[Segment]) -> Callable[[], Result]:
        obstacle = fused.why_not(q.device, q.dtype, q.shape[2])
        if kernel == "hopper":
            obstacle = fused.why_not_hopper(q.device, q.dtype, q.shape[2]) or obstacle
        if obstacle:
            raise InputError(obstacle)
        sources = [(segment.k, segment.v) for segment in segments]
        parts = [Part(number, 0, len(segment.k), segment.causal) for number, segment in enumerate(segments)]
        tasks = (Task(0, len(q), tuple(parts)),)

        def call() -> Result:
            out = torch.empty_like(q)
            lse = q.new_empty(q.shape[1], len(q), dtype=torch.float32)
            fused.launch(q, sources, tasks, q.shape[2] ** -0.5, out, lse, kernel=kernel)
            return out, lse

        return call

    return make


def _split_keys(q: Tensor, segments: list[Segment]) -> Callable[[], Result]:
    if len(q) > fused.FEW_ROWS:
        raise InputError(f"splitting keys is for up to {fused.FEW_ROWS} rows")
    if obstacle := fused.why_not(q.device, q.dtype, q.shape[2]):
        raise InputError(obstacle)
    return lambda: fused.attention(q, segments, q.shape[2] ** -0.5)


def _torch(q: Tensor, segments: list[Segment]) -> Callable[[], Result]:
    calls = _context_first(segments)
    return lambda: sdpa.attention(q, calls, q.shape[2] ** -0.5)


def _flash2(q: Tensor, segments: list[Segment]) -> Callable[[], Result]:
    if q.device.type != "cuda":
        raise InputError("FlashAttention 2 needs an NVIDIA GPU")
    if len(segments) == 1 and len(q) == 1:
        segments = [Segment(segments[0].k, segments[0].v)]  # a single row sees every key: no mask

    def one(segment: Segment) -> Result:
        q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, segment.k, segment.v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(q4, k4, v4, 0.0, segment.causal, scale=q.shape[2] ** -0.5)[:2]
        return out[0].transpose(0, 1), lse[0, :, : len(q)]

    calls = _context_first(segments)

    def call() -> Result:
        results = [one(segment) for segment in calls]
        if len(results) == 1:
            return results[0]
        out, lse = merge([out for out, _ in results], [lse for _, lse in results])
        return out.to(q.dtype), lse

    return call


def _flex(q: Tensor, segments: list[Segment]) -> Callable[[], Result]:
    if q.device.type != "cuda":
        raise InputError("FlexAttention is compared on NVIDIA GPUs")
    from torch.nn.attention.flex_attention import create_block_mask

    k, v = _concatenated(segments)
    context = len(k) - len(q)

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key <= row + context

    mask = create_block_mask(visible, None, None, len(q), len(k), device=q.device)
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    flex = _compiled_flex()

    def call() -> Result:
        out, lse = flex(q4, k4, v4, block_mask=mask, enable_gqa=True, return_lse=True)
        return out[0].transpose(0, 1), lse[0]

    return call


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flash3(q: Tensor, segments: list[Segment]) -> Callable[[], Result]:
    flash = _load_flash3()
    k, v = _concatenated(segments)

    def call() -> Result:
        out, lse = flash(q[None], k[None], v[None], softmax_scale=q.shape[2] ** -0.5, is_causal=True)[:2]
        return out[0], lse[0]

    return call


@cache
def _load_flash3() -> Any:
    """FlashAttention 3 from xformers' wheel; it needs the CUDA 12 runtime of nvidia-cuda-runtime-cu12."""
    library = _inside("xformers", "flash_attn_3/_C.so")
    ctypes.CDLL(str(_inside("nvidia", "cuda_runtime/lib/libcudart.so.12")), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(library))
    return torch.ops.flash_attn_3.fwd


def _inside(package: str, path: str) -> Path:
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    for folder in folders:
        if (found := Path(folder, path)).exists():
            return found
    raise InputError(f"{package}/{path} is not installed")


def _reference(q: Tensor, segments: list[Segment]) -> Callable[[], Result]:
    if q.shape[1] * len(q) * sum(len(segment.k) for segment in segments) > 1 << 28:
        raise InputError("too large for the reference")
    return lambda: reference.attention(q, segments, q.shape[2] ** -0.5)


def _context_first(segments: list[Segment]) -> list[Segment]:
    """Concatenate all segments but the causal one, so that two calls suffice."""
    *others, own = segments
    if not others:
        return [own]
    return [Segment(*_concatenated(others)), own]


def _concatenated(segments: list[Segment]) -> tuple[Tensor, Tensor]:
    return torch.cat([segment.k for segment in segments]), torch.cat([segment.v for segment in segments])


KERNELS: dict[str, Callable[[Tensor, list[Segment]], Callable[[], Result]]] = {
    "fused (Hopper)": _fused("hopper"),
    "fused (plain Triton)": _fused("portable"),
    "fused (split keys)": _split_keys,
    "torch, two calls": _torch,
    "FlashAttention 2, two calls": _flash2,
    "FlexAttention": _flex,
    "FlashAttention 3": _flash3,
    "reference": _reference,
}
