"""The small kernels of a layer on one NVIDIA GPU: selection, decode, and what a cache in 8 bits would cost in accuracy.

    python benchmarks/small_kernels.py --out benchmarks/results/small_kernels.json

Heads of Llama-3.1-8B, bf16, random values. Times are of a call in a CUDA graph, without its launches; eager ones of a
call as Python issues them. Selection: every step and all three, by torch and by the package's kernels; a choice's share
of pairs that scores in fp64 choose too, and the share of pairs that are packed as they should be. The floor is what a
step's bytes or products take at least, at the rates of a copy and of a large product of the same run; inputs are read
again and again and may stay in the GPU's cache. Decode takes turns with several caches, so that keys come from memory.
Its errors are relative to the reference back-end: of outputs to its result rounded to bf16, of partial results in fp32
to that in fp32, and the largest difference of log-sum-exps.
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
# Selection: rows of the question; tokens of a block and pairs passed on.
ROWS, BLOCKS = 64, ((16384, 2048), (65536, 8192))
# Decode: keys, rows, and caches that take turns.
KEYS, DECODED, CACHES = (32768, 131072), (1, 32), 3
# Calls in a graph, or in a row; times are medians of so many repeats.
CALLS, REPEAT = 21, 9
# How a column is headed, what its figures are divided by, and their form; others are shown as they are.
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
    """(tokens, heads, head_dim) bf16, each head's tokens in one piece, as they lie in the cache."""
    return torch.randn(heads, tokens, HEAD_DIM, device=device).bfloat16().transpose(0, 1)


def median_seconds(call: Callable[[], object], calls: int = 1) -> float:
    """By the GPU's clock, of one of so many calls that are issued one after the other."""
    seconds = []
    for _ in range(REPEAT):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # while it is computed, those that are timed are issued
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(seconds)


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one of the calls, which take turns in a CUDA graph: there, launching from Python costs nothing."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            calls[number % len(calls)]()
    return median_seconds(graph.replay) / CALLS


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills of a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ())


def temporary_bytes(call: Callable[[], object]) -> int:
    """Most that a call has allocated at a time, its result among it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def exact_scores(q: Tensor, k: Tensor) -> Tensor:
    """What :func:`apb.kernels.selection.attention_received` computes, in fp64; the result in fp32."""
    received = []
    for head, rows in enumerate(q.double().split(HEADS // KV_HEADS, dim=1)):
        logits = rows.flatten(0, 1) @ k[:, head].double().T * SCALE
        received.append(logits.softmax(-1).mean(0))
    return torch.stack(received).float()


def bench_selection(tokens: int, pairs: int, device: torch.device, copy: float, products: float) -> Iterator[Row]:
    """A row for every step and who computes it; ``copy`` is in bytes, ``products`` in FLOPs a second."""
    torch.manual_seed(0)
    q, k, v = draw(ROWS, HEADS, device), draw(tokens, KV_HEADS, device), draw(tokens, KV_HEADS, device)
    exact = exact_scores(q, k)
    wanted = selection.choose(exact, pairs, tokens, pooled=True, triton=False)
    expected = torch.stack([torch.stack([x[wanted[h], h] for h in range(KV_HEADS)], 1) for x in (k, v)])
    message = k.new_empty(2, KV_HEADS, pairs, HEAD_DIM).transpose(1, 2)  # as it is sent
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
    """Rows that are the cache's last; ``copy``: bytes a second."""
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
    """A table for each part, then the rates that figures stand beside, the hardware and the versions."""
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
        raise InputError(f"The figures cannot be written to {str(out)!r}: there is no folder {str(out.parent)!r}.")
    device, dtype = pick_device(None), torch.bfloat16
    if device.type != "cuda":
        raise InputError("These kernels are measured on an NVIDIA GPU, and torch sees none here.")
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
