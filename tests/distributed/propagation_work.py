"""What the ranks of the tests of propagation do, in one start, as in rank_work.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import apb
import propagated
from apb.distributed.collectives import Group

SIZES = (1, 2, 3, 4)


def everything(folder: str) -> None:
    """One rank's part; writes {(size, model, reading, keep): Outcome} to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, outcomes = dist.get_rank(), {}
    for size in SIZES:
        group = Group(rank, size, dist.new_group(range(size)))
        if rank < size:
            for name, reading in propagated.CASES:
                outcomes[size, name, reading, propagated.KEEP] = propagated.read(name, reading, group)
            for reading in propagated.READINGS:
                for keep in (1.0, None):
                    propagation = None if keep is None else apb.Propagation(propagated.LAYER, keep)
                    found = propagated.read("qwen3", reading, group, propagation=propagation)
                    outcomes[size, "qwen3", reading, keep] = found
        dist.barrier()
    torch.save(outcomes, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
