"""Attention of a block over [anchor | passing block | block] by several kernels: times and errors.

The work is that of one rank in one layer of APB. Inputs that a competitor needs concatenated are concatenated before
the clock starts. FLOPs count unmasked query/key pairs; errors are against fp64, on a sample of rows and heads. The
kernels of a shape take turns, so that all of them run under the same power and thermal conditions. A turn is long
enough for the GPU clock to settle at the kernel's own power draw, as it does in a prefill; calls before that are not
timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..hardware import synchronize
from ..kernels.segment import Segment
from .attention_kernels import KERNELS, Result

# A turn is as many calls as fill this many seconds, at least two; the first quarter of them, at least one, is untimed.
_TURN_S, _UNTIMED = 0.2, 0.25
_SAMPLED_ROWS, _SAMPLED_HEADS = 256, 3


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dim; lengths, in rows, of the block, the anchor and the passing block."""

    heads: int
    kv_heads: int
    head_dim: int
    block: int
    anchor: int
    passing: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Parse a shape such as "32/8,128,16384,4096,14336"; InputError if ``text`` is none."""
        try:
            heads, *rest = text.split(",")
            numbers = [int(x) for x in (*heads.split("/"), *rest)]
            shape = cls(*numbers)
        except (TypeError, ValueError) as error:
            form = "HEADS/KV_HEADS,HEAD_DIM,BLOCK,ANCHOR,PASSING, such as 32/8,128,16384,4096,14336"
            raise InputError(f"A shape is {form}, not {text!r}.") from error
        if min(numbers[:4]) < 1 or min(numbers) < 0 or shape.heads % shape.kv_heads:
            raise InputError(
                f"A shape needs positive sizes, and heads that are a multiple of the KV heads, not {text!r}."
            )
        return shape

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads},{self.head_dim},{self.block},{self.anchor},{self.passing}"

    @property
    def flops(self) -> int:
        """FLOPs of QK and PV over the unmasked query/key pairs."""
        pairs = self.block * (self.anchor + self.passing) + self.block * (self.block + 1) // 2
        return 4 * self.heads * self.head_dim * pairs

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes of all keys and values."""
        return 2 * (self.block + self.anchor + self.passing) * self.kv_heads * self.head_dim * element_bytes


# A rank's rows under APB at 128K, 64K and 512K tokens; the first of these with ragged lengths; and one decode step.
GPU_SHAPES = [
    Shape(32, 8, 128, 16384, 4096, 14336),
    Shape(32, 8, 128, 8192, 2048, 1024),
    Shape(32, 8, 64, 16384, 4096, 14336),
    Shape(40, 8, 128, 65536, 8192, 28672),
    Shape(32, 8, 128, 16001, 4093, 14311),
    Shape(16, 8, 256, 8192, 2048, 7168),
    Shape(32, 8, 128, 1, 0, 131071),
]
CPU_SHAPES = [Shape(8, 2, 64, 512, 128, 448)]


@dataclass(frozen=True)
class Row:
    """One kernel on one shape.

    Attributes:
        seconds: median over ``all_seconds``, a call's time in each turn; turn i of all kernels of a shape is one round.
        of_fastest: median over the rounds of the fastest kernel's time over this one's; 1 for the fastest itself.
        error: norm of the difference to fp64 over the norm of fp64, on the sample; ``lse_error``: largest difference.
        kv_bytes_per_s: bytes of keys and values per second, the relevant rate in decode.
        note: the reason for missing figures; None if there are figures.
    """

    shape: str
    kernel: str
    seconds: float | None = None
    all_seconds: list[float] | None = None
    of_fastest: float | None = None
    tflops: float | None = None
    kv_bytes_per_s: float | None = None
    error: float | None = None
    lse_error: float | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)


def bench_attention(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, repeat: int, kernels: Sequence[str] = ()
) -> Iterator[Row]:
    """Yield a row for every shape and kernel (all kernels if none is named), on random inputs seeded by shape."""
    for name in kernels:
        if name not in KERNELS:
            raise InputError(f"Unknown kernel {name!r}; choose from {', '.join(KERNELS)}.")
    for number, shape in enumerate(shapes):
        torch.manual_seed(number)
        q, segments = _inputs(shape, device, dtype)
        sample = _sample(shape, device)
        expected = _dense(q, segments, *sample)
        rows: dict[str, Row] = {}
        calls: dict[str, Callable[[], Result]] = {}
        for name in kernels or KERNELS:
            try:
                call = KERNELS[name](q, segments)
                rows[name] = _checked(shape, name, call, q, sample, expected)
                calls[name] = call
            except Exception as error:  # if one kernel fails, the others are still compared
                rows[name] = Row(str(shape), name, note=str(error).splitlines()[0][:200])
        seconds = _in_turns(calls, device, repeat)
        fastest = min(seconds.values(), key=statistics.median, default=[])
        for name, row in rows.items():
            yield _timed(row, shape, q.element_size(), seconds[name], fastest) if name in seconds else row


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[Segment]]:
    def draw(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, shape.head_dim, device=device).to(dtype)

    lengths = [(shape.anchor, False), (shape.passing, False), (shape.block, True)]
    if shape.block == 1:  # a decode step: one segment, whose last key is the row's own
        lengths = [(shape.anchor + shape.passing + 1, True)]
    segments = [
        Segment(draw(rows, shape.kv_heads), draw(rows, shape.kv_heads), causal) for rows, causal in lengths if rows
    ]
    return draw(shape.block, shape.heads), segments


def _sample(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sampled rows and heads, both with the first and the last."""
    rows = torch.randperm(shape.block, device=device)[:_SAMPLED_ROWS]
    rows[0], rows[-1] = 0, shape.block - 1
    heads = torch.linspace(0, shape.heads - 1, min(_SAMPLED_HEADS, shape.heads), device=device).round().long()
    return rows, heads


def _dense(q: Tensor, segments: list[Segment], rows: Tensor, heads: Tensor) -> Result:
    """Masked softmax attention in fp64 for some rows and heads: out (rows, heads, head_dim) and lse (heads, rows)."""
    outs, lses = [], []
    for head in heads.tolist():
        scores, values = [], []
        for segment in segments:
            keys, kv_heads, _ = segment.k.shape
            group = head // (q.shape[1] // kv_heads)
            score = q[rows, head].double() @ segment.k[:, group].double().T * q.shape[2] ** -0.5
            if segment.causal:
                last = rows[:, None] + keys - len(q)
                score = score.masked_fill(torch.arange(keys, device=q.device) > last, float("-inf"))
            scores.append(score)
            values.append(segment.v[:, group].double())
        score = torch.cat(scores, 1)
        outs.append(score.softmax(1) @ torch.cat(values))
        lses.append(score.logsumexp(1))
    return torch.stack(outs, 1), torch.stack(lses)


def _checked(
    shape: Shape, name: str, call: Callable[[], Result], q: Tensor, sample: tuple[Tensor, Tensor], expected: Result
) -> Row:
    """Result row with the errors of one call."""
    rows, heads = sample
    poison = torch.full_like(q, float("nan"))  # freed again, so that output the call leaves unwritten is nan
    del poison
    out, lse = call()
    error = (out[rows][:, heads].double() - expected[0]).norm() / expected[0].norm()
    lse_error = (lse[heads][:, rows].double() - expected[1]).abs().max()
    if not out.isfinite().all():
        raise InputError("wrong: not all of the output is finite")
    return Row(str(shape), name, error=float(error), lse_error=float(lse_error))


def _in_turns(calls: dict[str, Callable[[], Result]], device: torch.device, repeat: int) -> dict[str, list[float]]:
    """Seconds per call of every kernel, ``repeat`` times: all take one turn, then all take the next."""
    counts = {}
    for name, call in calls.items():
        fit = _TURN_S / _turn(call, device, 1, 1)
        counts[name] = [max(1, round(share * fit)) for share in (_UNTIMED, 1 - _UNTIMED)]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            seconds[name].append(_turn(call, device, *counts[name]))
    return seconds


def _turn(call: Callable[[], Result], device: torch.device, untimed: int, timed: int) -> float:
    """Mean seconds of ``timed`` calls after ``untimed`` ones, which keep a GPU busy while the timed are launched."""
    synchronize(device)
    for _ in range(untimed):
        call()
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(timed):
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / timed
    began = time.perf_counter()
    for _ in range(timed):
        call()
    return (time.perf_counter() - began) / timed


def _timed(row: Row, shape: Shape, element_bytes: int, seconds: list[float], fastest: list[float]) -> Row:
    median = statistics.median(seconds)
    return replace(
        row,
        seconds=median,
        all_seconds=seconds,
        of_fastest=statistics.median(best / own for best, own in zip(fastest, seconds, strict=True)),
        tflops=shape.flops / median / 1e12,
        kv_bytes_per_s=shape.kv_bytes(element_bytes) / median,
    )
