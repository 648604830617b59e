"""The small kernels of a layer on one NVIDIA GPU: selection, decode, and the accuracy cost of an 8-bit cache.

    python benchmarks/small_kernels.py --out benchmarks/results/small_kernels.json

Heads of Llama-3.1-8B, bf16, random values. Times are of a call in a CUDA graph, without launch overhead; eager times
are of a call issued from Python. Selection: each step and all three, by torch and by the package's kernels, with the
share of chosen pairs that fp64 scores choose too, and the share of correctly packed pairs. The floor is the least time
for a step's bytes or products, at the rates of a copy and of a large product in the same run; inputs are read
repeatedly and may stay in the GPU's cache. Decode alternates between several caches, so that keys come from memory.
Its errors are against the reference back-end: outputs against its result rounded to bf16, partial results in fp32
against its fp32 result, and the largest difference of log-sum-exps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fp8_cache import HEAD_DIM, HEADS, KV_HEADS, Row, distance, storing_errors
from torch import Tensor

from apb import InputError, Segment
from apb.benchmarks.ceilings import copy_bandwidth, product_rate
from apb.hardware import fingerprint
from apb.hf.loading import pick_device
from apb.kernels import fused, reference, selection

SCALE = HEAD_DIM**-0.5
# Selection: query rows; tokens of a block and pairs passed on.
ROWS, BLOCKS = 64, ((16384, 2048), (65536, 8192))
# Decode: keys, rows, and alternating caches.
KEYS, DECODED, CACHES = (32768, 131072), (1, 32), 3
# Calls in a graph, or back to back; times are medians over REPEAT repeats.
CALLS, REPEAT = 21, 9
# Column heading, divisor and format of a figure; others are shown unchanged.
COLUMNS = {
    "seconds": ("us", 1e-6, ".1f"),
    "eager_seconds": ("eager us", 1e-6, ".1f"),
    "temporary_bytes": ("temporary MiB", 2**20, ".1f"),
    "floor_seconds": ("floor us", 1e-6, ".1f"),
    "of_floor": ("of floor", 1, ".1%"),
    "same_choice": ("same choice", 1, ".2%"),
    "kv_bytes_per_s": ("TB/s of K, V", 1e12, ".2f"),
    "of_copy": ("of a copy", 1, ".1%"),
}


def draw(tokens: int, heads: int, device: torch.device) -> Tensor:
    """(tokens, heads, head_dim) bf16, each head's tokens contiguous in memory, as in the cache."""
    return torch.randn(heads, tokens, HEAD_DIM, device=device).bfloat16().transpose(0, 1)


def median_seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Median seconds per call, by CUDA events, of ``calls`` back-to-back calls."""
    seconds = []
    for _ in range(REPEAT):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # keeps the GPU busy while the timed calls are launched
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(seconds)


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds per call of ``calls``, alternating in a CUDA graph, without the overhead of Python launches."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            calls[number % len(calls)]()
    return median_seconds(graph.replay) / CALLS


def launches(call: Callable[[], object]) -> int:
    """Number of kernels, copies and fills that a call launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ())


def temporary_bytes(call: Callable[[], object]) -> int:
    """Peak memory that a call allocates, in bytes, its result included."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def exact_scores(q: Tensor, k: Tensor) -> Tensor:
    """:func:`apb.kernels.selection.attention_received` computed in fp64; returns fp32."""
    received = []
    for head, rows in enumerate(q.double().split(HEADS // KV_HEADS, dim=1)):
        logits = rows.flatten(0, 1) @ k[:, head].double().T * SCALE
        received.append(logits.softmax(-1).mean(0))
    return torch.stack(received).float()


def bench_selection(tokens: int, pairs: int, device: torch.device, copy: float, products: float) -> Iterator[Row]:
    """Yield a row per step and implementation; ``copy`` is in bytes per second, ``products`` in FLOPs per second."""
    torch.manual_seed(0)
    q, k, v = draw(ROWS, HEADS, device), draw(tokens, KV_HEADS, device), draw(tokens, KV_HEADS, device)
    exact = exact_scores(q, k)
    wanted = selection.choose(exact, pairs, tokens, pooled=True, triton=False)
    expected = torch.stack([torch.stack([x[wanted[h], h] for h in range(KV_HEADS)], 1) for x in (k, v)])
    message = k.new_empty(2, KV_HEADS, pairs, HEAD_DIM).transpose(1, 2)  # strides of the send buffer
    floors = {
        "score": max((k.nbytes + exact.nbytes) / copy, 2 * q.numel() * tokens / products),
        "choose": (exact.nbytes + wanted.nbytes) / copy,
        "pack": 2 * expected.nbytes / copy,
    }
    floors["all"] = sum(floors.values())

    def common(chosen: Tensor) -> float:
        return sum(torch.isin(*two).sum().item() for two in zip(chosen, wanted, strict=True)) / wanted.numel()

    for by, triton in (("torch", False), ("kernels", True)):
        score = partial(selection.attention_received, q, k, SCALE, triton=triton)
        choose = partial(selection.choose, count=pairs, selectable=tokens, pooled=True, triton=triton)
        pack = partial(selection.pack, k, v, out=message, triton=triton)

        def whole(score: Any = score, choose: Any = choose, pack: Any = pack) -> None:
            pack(choose(score()))

        steps: dict[str, Callable[[], object]] = {"score": score, "choose": partial(choose, exact)}
        steps |= {"pack": partial(pack, wanted), "all": whole}
        same = {"choose": common(choose(exact))}
        same["score"] = same["all"] = common(choose(score()))
        message.fill_(math.nan)
        pack(wanted)
        same["pack"] = (message == expected).all(-1).all(0).double().mean().item()
        for step, call in steps.items():
            seconds = graph_seconds([call])
            yield {
                "tokens": tokens,
                "pairs": pairs,
                "step": step,
                "by": by,
                "seconds": seconds,
                "eager_seconds": median_seconds(call, CALLS),
                "launches": launches(call),
                "temporary_bytes": temporary_bytes(call),
                "floor_seconds": floors[step],
                "of_floor": floors[step] / seconds,
                "same_choice": same[step],
            }


def bench_decode(rows: int, keys: int, device: torch.device, copy: float) -> Row:
    """Result row of decode with the cache's last ``rows`` rows; ``copy``: bytes per second."""
    from apb.kernels import decode

    torch.manual_seed(0)
    q = draw(rows, HEADS, device)
    caches = [(draw(keys, KV_HEADS, device), draw(keys, KV_HEADS, device)) for _ in range(CACHES)]
    k, v = caches[0]
    held = torch.tensor([keys], dtype=torch.int32, device=device)
    attend = partial(decode.attention, q, scale=SCALE, causal=True, length=held)
    wanted, wanted_lse = reference.attention(q.float(), [Segment(k, v, causal=True)], SCALE)
    out, lse = attend(k, v)
    part, _ = attend(k, v, partial=True)
    seconds = graph_seconds([partial(attend, *cache) for cache in caches])
    rate = (k.nbytes + v.nbytes) / seconds
    return {
        "rows": rows,
        "keys": keys,
        "seconds": seconds,
        "kv_bytes_per_s": rate,
        "of_copy": rate / copy,
        "error": distance(out, wanted.bfloat16()),
        "partial_error": distance(part, wanted),
        "lse_error": (lse - wanted_lse).abs().max().item(),
    }


def shown(name: str, value: Any) -> str:
    """One cell of a table."""
    if name in COLUMNS:
        return format(value / COLUMNS[name][1], COLUMNS[name][2])
    return value if isinstance(value, str) else format(value, "," if isinstance(value, int) else ".1e")


def print_report(report: dict[str, Any]) -> None:
    """Print a table for each part, then the measured ceilings, the hardware and the versions."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for part in ("selection", "decode", "fp8_cache"):
        names = list(report[part][0])
        heads = [COLUMNS[name][0] if name in COLUMNS else name.replace("_", " ") for name in names]
        table = Table(*heads, title=part.replace("_", " "))
        for row in report[part]:
            table.add_row(*(shown(name, row[name]) for name in names))
        console.print(table)
    copy, products = report["copy_bandwidth"] / 1e12, report["product_rate"] / 1e12
    facts = ", ".join(f"{name} {value}" for name, value in report["fingerprint"].items())
    console.print(f"A copy moves {copy:.2f} TB/s, a large product reaches {products:.0f} TFLOP/s here; {facts}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    out: Path | None = parser.parse_args().out
    if out is not None and not out.parent.is_dir():
        raise InputError(f"The results cannot be written to {str(out)!r}: there is no folder {str(out.parent)!r}.")
    device, dtype = pick_device(None), torch.bfloat16
    if device.type != "cuda":
        raise InputError("These kernels are measured on an NVIDIA GPU, but torch sees none here.")
    if obstacle := fused.why_not(device, dtype, HEAD_DIM):
        raise InputError(f"These kernels do not run here: {obstacle}.")
    copy, products = copy_bandwidth(device), product_rate(device, dtype)
    report: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "fingerprint": fingerprint(device, dtype),
        "copy_bandwidth": copy,
        "product_rate": products,
        "selection": [row for block in BLOCKS for row in bench_selection(*block, device, copy, products)],
        "decode": [bench_decode(rows, keys, device, copy) for keys in KEYS for rows in DECODED],
        "fp8_cache": [row for keys in KEYS for row in storing_errors(keys, device)],
    }
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"small_kernels.py: {error}", file=sys.stderr)
        sys.exit(2)
