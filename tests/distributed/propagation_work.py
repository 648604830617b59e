"""What the ranks of the tests of propagation do, in one start, as in rank_work.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import apb
import propagated
from apb.distributed.collectives import Group
from families import PROMPT

SIZES = (1, 2, 3, 4)
STORED = ("gemma3_text", "apb")
SOME = [("qwen3", "ring"), ("qwen3", "ulysses"), ("qwen3", "apb, 3 rounds"), ("qwen3", "star"), ("gemma3_text", "apb")]


def cases(size: int) -> list[tuple[str, str]]:
    """What so many ranks read: everything alone and on most ranks, else some of it."""
    return propagated.CASES if size in (1, 4) else SOME


def readings(size: int) -> list[str]:
    """The same of readings that keep all rows."""
    return list(propagated.READINGS)[:: 1 if size in (1, 4) else 3]


def store(group: Group, place: Path) -> torch.Tensor:
    """What a document from disk says to its question; it is read by one rank, and written again by these."""
    engine = propagated.engine(*STORED, group)
    if group.size == 1:
        engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix, question=PROMPT.query).save(place)
    document = engine.load(place)
    logits = document.prefill(PROMPT.query).logits
    document.save(place)
    engine.close()
    return logits


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
            outcomes[size, "stored"] = store(group, Path(folder, "store"))
        dist.barrier()
    torch.save(outcomes, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
