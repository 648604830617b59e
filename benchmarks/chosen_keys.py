"""One layer's decode on an NVIDIA GPU: attention over all keys, and over those that pages or clusters choose.

    python benchmarks/chosen_keys.py --out benchmarks/results/chosen_keys_h200.json

Heads of Llama-3.1-8B, bf16, one row, a share of random keys. Seconds are medians of a call in a CUDA graph that
alternates between caches, so that keys and indexes come from memory; those of each launch are of the profiler, of calls
without a graph. Building is the mean over the caches, after an untimed one of fewer keys.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fp8_cache import HEAD_DIM, HEADS, KV_HEADS
from small_kernels import graph_seconds
from torch import Tensor

from apb.decoding import Indexed, Pages, Squeezed
from apb.decoding.base import RECENT
from apb.decoding.selecting import KeyIndex
from apb.hardware import Stopwatch, fingerprint
from apb.hf.loading import pick_device
from apb.kernels import chosen, decode

SCALE = HEAD_DIM**-0.5
CACHES = 3
PROFILED = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, action="append", help="keys; 131072 and 524288 if left out")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = pick_device("cuda")
    report: dict[str, Any] = {
        "command": f"python {' '.join(sys.argv)}",
        "fingerprint": fingerprint(device, torch.bfloat16),
        "rows": [],
    }
    for length in given.length or (131072, 524288):
        for row in measured(length, given.share, device):
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            if given.out:
                given.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(length: int, share: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for exact attention, then one for each method."""
    torch.manual_seed(0)
    q = 3 * torch.randn(1, HEADS, HEAD_DIM, device=device).bfloat16()
    caches = [[torch.randn(KV_HEADS, length, HEAD_DIM, device=device).bfloat16() for _ in "kv"] for _ in range(CACHES)]
    storages = torch.tensor([[k.data_ptr(), v.data_ptr(), length] for k, v in caches], device=device)
    held = torch.tensor([length], dtype=torch.int32, device=device)
    exact = [partial(decode.cached_attention, q, storages, number, KV_HEADS, SCALE, held) for number in range(CACHES)]
    seconds = graph_seconds(exact)
    yield {"keys": length, "method": "exact", "seconds": seconds, "launches": launches(exact)}
    for method in (Pages(share), Pages(share, page_size=32), Squeezed(share)):
        method.new_index().extend(caches[0][0][:, : min(length, 16384)])
        indexes, watch = [], Stopwatch(device)
        for k, _ in caches:
            indexes.append(method.new_index())
            indexes[-1].extend(k[:, : length - RECENT])
        build = watch.seconds() / CACHES
        calls, counts, scratch = attending(method, indexes, q, storages, held, length)
        found = graph_seconds(calls)
        yield {
            "keys": length,
            "method": repr(method),
            "seconds": found,
            "times_exact": seconds / found,
            "share": (counts.sum().item() * getattr(method, "page_size", 1) / CACHES / KV_HEADS + RECENT) / length,
            "build_seconds": build,
            "index_bytes": sum(x.nbytes for x in indexes[0].tensors().values()),
            "launches": launches(calls),
        }
        del indexes, calls, scratch


def attending(
    method: Indexed, indexes: Sequence[KeyIndex], q: Tensor, storages: Tensor, held: Tensor, length: int
) -> tuple[list[Callable[[], object]], Tensor, Tensor]:
    """A call for each cache, the tensor of what they count, and their scratch.

    The calls know caches, indexes and scratch by address alone: whoever calls them keeps these.
    """
    stored = [index.stored() for index in indexes]
    together = isinstance(method, Squeezed)
    budget = int(method.share * length) - RECENT
    scratch = held.new_empty(max(chosen.scratch_size(HEADS, index) for index in stored))
    rows = [chosen.row(index, budget * KV_HEADS if together else budget, scratch) for index in stored]
    table = torch.tensor(rows, device=q.device)
    counts = held.new_zeros(CACHES, KV_HEADS, chosen.CHUNKS)
    call = partial(chosen.attention, page_size=getattr(method, "page_size", None), together=together)
    return (
        [partial(call, q, storages, table, counts[number], number, KV_HEADS, SCALE, held) for number in range(CACHES)],
        counts,
        scratch,
    )


def launches(calls: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Mean seconds of each kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            for call in calls:
                call()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        found[event.key] += event.device_time_total / 1e6 / PROFILED / len(calls)
    return dict(found)


if __name__ == "__main__":
    main()
