"""Overlap of sends and attention in ring attention: time of one layer, of its attention alone and its sends alone.

    torchrun --nproc-per-node 2 benchmarks/ring_overlap.py --rows 131072 --out benchmarks/results/ring_overlap.json

Perfect overlap gives max(attention, sends); none gives their sum. Llama-3.1-8B's heads, bf16, random values.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apb import Plan
from apb.benchmarks.ceilings import median_seconds
from apb.compressors import make_compressor
from apb.distributed.collectives import Group, Pending
from apb.distributed.launch import join, local_device
from apb.hardware import fingerprint
from apb.hf.loading import pick_device
from apb.layers.base import AttentionInput
from apb.strategies.ring import Ring

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


@dataclass(frozen=True)
class Deaf(Group):
    """A group whose messages arrive at once: the same computation without communication."""

    def shift(self, x: Tensor) -> Pending:
        return Pending(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=131072, help="tokens of the document, over all ranks")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = local_device(pick_device(None))
    group = join(device)
    dtype = torch.bfloat16
    plan = Plan.build(prefix=0, document=arguments.rows, query=1, ranks=group.size, strategy="ring")
    compressor = make_compressor("query")
    ring = Ring(plan, group, compressor)
    alone = Ring(plan, Deaf(group.rank, group.size), compressor)
    rows = sum(map(len, ring.itinerary.spans))
    q, k, v = (torch.randn(rows, heads, HEAD_DIM, device=device, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    layer, out = AttentionInput(0, q, k, v, HEAD_DIM**-0.5), torch.empty_like(q)
    message = torch.stack([k, v])

    def send() -> None:
        for _ in range(group.size - 1):
            group.shift(message).wait()

    times = {}
    for name, function in {
        "layer": lambda: ring.attend_document(layer, out),
        "attention": lambda: alone.attend_document(layer, out),
        "sends": send,
    }.items():
        group.barrier()
        mine = torch.tensor([median_seconds(function, device, repeat=9)], dtype=torch.float64, device=device)
        times[name] = group.all_gather(mine).wait().max().item()
    best, worst = max(times["attention"], times["sends"]), times["attention"] + times["sends"]
    report = {
        "command": f"torchrun --nproc-per-node {group.size} {' '.join(sys.argv)}",
        "fingerprint": fingerprint(device, dtype),
        "ranks": group.size,
        "rows": arguments.rows,
        "seconds": times,
        "over_perfect_overlap": times["layer"] / best,
        "hidden_share_of_sends": (worst - times["layer"]) / min(times["attention"], times["sends"]),
    }
    if group.rank == 0:
        print(json.dumps(report, indent=1))
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
