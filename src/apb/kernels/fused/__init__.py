"""Attention of several tasks over up to three key/value sources in one launch, without concatenating them.

Two kernels share the schedule: :mod:`.hopper` in Gluon for sm_90, :mod:`.portable` in plain Triton for other GPUs.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..launching import on_device_of
from ..merge import merge
from ..segment import Segment
from .schedule import SOURCES, Part, Task, schedule

__all__ = ["Part", "Task", "attention", "launch", "why_not", "why_not_hopper"]


@dataclass(frozen=True)
class Config:
    """Tuning parameters of the Hopper kernel: the fastest of those tried on one H200.

    Attributes:
        block_n: keys of a tile.
        groups: consumer warpgroups, of 64 query rows each.
        stages: key/value tiles in flight.
        registers: registers per consumer thread.
        cap: the compiler's limit on registers per thread.
        ping_pong: consumers take turns at issuing their matrix products.
    """

    block_n: int
    groups: int
    stages: int
    registers: int
    cap: int
    ping_pong: bool

    @property
    def block_m(self) -> int:
        """Query rows of a tile."""
        return 64 * self.groups


HOPPER = {
    64: Config(block_n=128, groups=3, stages=4, registers=160, cap=128, ping_pong=False),
    128: Config(block_n=128, groups=2, stages=2, registers=240, cap=168, ping_pong=False),
    256: Config(block_n=64, groups=2, stages=2, registers=240, cap=168, ping_pong=True),
}
# Versions of Triton whose Gluon the kernel was compiled with.
GLUON_FROM, GLUON_BEFORE = (3, 6), (3, 10)
# Up to this many rows make too few tiles to fill a GPU: their keys are split instead.
FEW_ROWS = 64
# (block_m, block_n, warps, stages) of the plain Triton kernel, by head dim rounded up to a power of two.
PORTABLE = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 4, 2)}


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Reason these kernels cannot serve such tensors, or None if they can."""
    if device.type != "cuda" and not (_interpreted() and find_spec("triton")):
        return "the fused kernels run on NVIDIA GPUs"
    if device.type == "cuda" and (obstacle := why_no_triton()):
        return obstacle
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused kernels need compute capability 8.0"
    if device.type != "cuda" and dtype == torch.bfloat16:
        return "triton's interpreter computes bfloat16 products wrongly"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the fused kernels take bfloat16, float16 or float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256:
        return f"the fused kernels take head dims up to 256, not {head_dim}"
    return None


def why_not_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Reason the kernel for Hopper cannot serve such tensors, or None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "the kernel for Hopper needs a GPU of compute capability 9.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel for Hopper takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HOPPER:
        return f"the kernel for Hopper takes head dims of {', '.join(map(str, HOPPER))}, not {head_dim}"
    return why_no_triton() or _no_gluon()


def attention(
    q: Tensor, segments: Sequence[Segment], scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`apb.attention` for a positive scale, in one launch per three segments.

    Partial results of several launches are merged by log-sum-exp. Up to ``FEW_ROWS`` rows go to
    :mod:`apb.kernels.decode`, segment by segment.
    """
    rows, heads, head_dim = q.shape
    segments = [segment for segment in segments if len(segment.k)]
    if not rows or not segments:
        return torch.zeros_like(q), q.new_full((heads, rows), float("-inf"), dtype=torch.float32)
    results = []
    if rows <= FEW_ROWS:
        from .. import decode

        several = len(segments) > 1
        results = [
            decode.attention(q, part.k, part.v, scale, causal=part.causal, softcap=softcap, partial=several)
            for part in segments
        ]
    else:
        for first in range(0, len(segments), SOURCES):
            few = segments[first : first + SOURCES]
            out, lse = q.new_empty(rows, heads, head_dim), q.new_empty(heads, rows, dtype=torch.float32)
            parts = tuple(Part(index, 0, len(segment.k), segment.causal) for index, segment in enumerate(few))
            sources = [(segment.k, segment.v) for segment in few]
            launch(q, sources, (Task(0, rows, parts),), scale, out, lse, softcap=softcap)
            results.append((out, lse))
    if len(results) == 1:
        return results[0]
    out, lse = merge([out for out, _ in results], [lse for _, lse in results])
    return out.to(q.dtype), lse


def launch(
    q: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    tasks: tuple[Task, ...],
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    softcap: float | None = None,
    kernel: str | None = None,
) -> None:
    """Compute all tasks in one launch; rows that belong to no task are left unchanged.

    Args:
        q: (rows, heads, head_dim), bf16, fp16 or fp32, any strides.
        sources: up to three pairs k, v (keys, kv_heads, head_dim) of q's dtype and device, any strides. Keys outside
            a task's parts may be read; their values do not matter as long as they are finite.
        tasks: the rows, and the keys of each source that they see.
        scale: positive factor on q.k.
        out: (rows, heads, head_dim), written in place; contiguous in its last dimension.
        lse: (heads, rows) fp32, contiguous, written in place.
        softcap: logits x become softcap * tanh(x / softcap).
        kernel: "hopper" or "portable"; by default "hopper" if it can serve these tensors, else "portable".
    """
    if not any(task.stop > task.start for task in tasks):
        return
    head_dim = q.shape[2]
    if kernel is None:
        kernel = "portable" if why_not_hopper(q.device, q.dtype, head_dim) else "hopper"
    kv_heads = next((k.shape[1] for k, _ in sources if len(k)), q.shape[1])
    # Missing and empty sources are not read, but the kernels need a valid address.
    sources = [source if len(source[0]) else (q[:1], q[:1]) for source in sources]
    sources += [(q[:1], q[:1])] * (SOURCES - len(sources))
    # The kernels work in base 2: 2 ** (scale * s), or 2 ** (scale * tanh), where tanh comes from 2 ** (cap * s).
    log2e = 1 / math.log(2)
    factors = (scale * log2e, 1.0) if softcap is None else (softcap * log2e, 2 * scale / softcap * log2e)
    run = _launch_hopper if kernel == "hopper" else _launch_portable
    run(q, kv_heads, sources, tasks, factors, softcap is not None, out, lse)


def _launch_hopper(
    q: Tensor,
    kv_heads: int,
    sources: Sequence[tuple[Tensor, Tensor]],
    tasks: tuple[Task, ...],
    factors: tuple[float, float],
    capped: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import hopper

    heads, head_dim = q.shape[1:]
    config = HOPPER[head_dim]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)

    def descriptor(x: Tensor, rows: int) -> Any:
        x = _copyable(x)
        length, count, _ = x.shape
        # A dimension of one element may have any stride; TMA requires multiples of 16 bytes.
        strides = [x.stride(1) if count > 1 else head_dim, x.stride(0) if length > 1 else head_dim, 1]
        return TensorDescriptor(x, [count, length, head_dim], strides, [1, rows, head_dim], layout)

    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    plan = schedule(tasks, heads, kv_heads, head_dim * 2, config.block_m, config.block_n, processors, q.device)
    with on_device_of(q):
        hopper.forward[(len(plan.bounds) - 1,)](
            descriptor(q, 64),
            *(descriptor(x, config.block_n) for source in sources for x in source),
            out,
            lse,
            out.stride(0),
            out.stride(1),
            lse.stride(0),
            *factors,
            plan.table,
            plan.items,
            plan.bounds,
            H=heads,
            GROUP=heads // kv_heads,
            D=head_dim,
            BN=config.block_n,
            GROUPS=config.groups,
            STAGES=config.stages,
            PING_PONG=config.ping_pong,
            CAPPED=capped,
            REGISTERS=config.registers,
            num_warps=4,
            maxnreg=config.cap,
        )


def _copyable(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if TMA cannot read its strides or address."""
    aligned = x.stride(2) == 1 and x.data_ptr() % 16 == 0
    for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True):
        aligned = aligned and (size == 1 or (stride > 0 and stride % 8 == 0))
    return x if aligned else x.contiguous()


def _launch_portable(
    q: Tensor,
    kv_heads: int,
    sources: Sequence[tuple[Tensor, Tensor]],
    tasks: tuple[Task, ...],
    factors: tuple[float, float],
    capped: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    from . import portable

    heads, head_dim = q.shape[1:]
    padded = max(64, 1 << (head_dim - 1).bit_length())
    block_m, block_n, warps, stages = PORTABLE[padded]
    if q.dtype == torch.float32:
        block_m, block_n, stages = block_m // 2, block_n // 2, 2
    elif q.is_cuda and _shared_memory(q.device) < 128 << 10:
        stages = 2  # GPUs with 99 KiB per program: a third stage does not fit at head dim 128
    plan = schedule(tasks, heads, kv_heads, head_dim * q.element_size(), block_m, block_n, 1, q.device)
    q, *pairs = (x if x.stride(2) == 1 else x.contiguous() for x in (q, *(x for source in sources for x in source)))
    used = 1 + max((part.source for task in tasks for part in task.parts), default=0)
    with on_device_of(q):
        portable.forward[(len(plan.items),)](
            q,
            *pairs,
            out,
            lse,
            *q.stride()[:2],
            *(stride for x in pairs for stride in x.stride()[:2]),
            *out.stride()[:2],
            lse.stride(0),
            *factors,
            plan.table,
            plan.items,
            H=heads,
            GROUP=heads // kv_heads,
            D=head_dim,
            BD=padded,
            BM=block_m,
            BN=block_n,
            SOURCES=used,
            CAPPED=capped,
            num_warps=warps,
            num_stages=stages,
        )


def _shared_memory(device: torch.device) -> int:
    """Maximum shared memory of a program, in bytes."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's type stubs do not know the field
    return int(properties.shared_memory_per_block_optin)


@cache
def why_no_triton() -> str | None:
    """Reason Triton cannot compile kernels here, or None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        return "triton needs a C compiler, and none was found"
    return None


@cache
def _no_gluon() -> str | None:
    """Reason Gluon cannot be used, or None if it can: it is experimental, and its API may change with every version."""
    import triton

    found = tuple(int(x) for x in triton.__version__.split(".")[:2])
    if GLUON_FROM <= found < GLUON_BEFORE:
        return None
    first, after = (".".join(map(str, version)) for version in (GLUON_FROM, GLUON_BEFORE))
    return f"the kernel for Hopper is written for triton from {first} and before {after}, not {triton.__version__}"


def _interpreted() -> bool:
    """True if Triton's interpreter replaces the GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
