"""What the ranks of the tests of propagation do, in one start, as in rank_work.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import apb
import propagated
from apb.distributed.collectives import Group

SIZES = (1, 2, 3, 4)
SOME = [("qwen3", "ring"), ("qwen3", "ulysses"), ("qwen3", "apb, 3 rounds"), ("qwen3", "star"), ("gemma3_text", "apb")]


def cases(size: int) -> list[tuple[str, str]]:
    """What so many ranks read: everything alone and on most ranks, else some of it."""
    return propagated.CASES if size in (1, 4) else SOME


def readings(size: int) -> list[str]:
    """The same of readings that keep all rows."""
    return list(propagated.READINGS)[:: 1 if size in (1, 4) else 3]


def everything(folder: str) -> None:
    """One rank's part; writes {(size, model, reading, keep): Outcome} to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, outcomes = dist.get_rank(), {}
    for size in SIZES:
        group = Group(rank, size, dist.new_group(range(size)))
        if rank < size:
            for name, reading in cases(size):
                outcomes[size, name, reading, propagated.KEEP] = propagated.read(name, reading, group)
            for reading in readings(size):
                for keep in (1.0, None):
                    propagation = None if keep is None else apb.Propagation(propagated.LAYER, keep)
                    found = propagated.read("qwen3", reading, group, propagation=propagation)
                    outcomes[size, "qwen3", reading, keep] = found
        dist.barrier()
    torch.save(outcomes, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
