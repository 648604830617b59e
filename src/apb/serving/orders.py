"""What rank 0 has all ranks do next, and how each request's last piece of work went on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.collectives import Group

# Requests that are read or answered at a time, each on a thread of its own.
MOST_RUNNING = 16
# What rank 0 may tell the others to do; START, WORK and CANCEL name requests.
NOTHING, START, WORK, CANCEL, WRITE, STOP = range(6)
# How a request's last piece of work ended. APART: a pass that read its token with others' failed, and changed nothing.
GOES_ON, APART, ENDED, FAILED = range(4)


class Orders:
    """The line between rank 0 and the others; every rank has one and makes the same calls."""

    def __init__(self, everyone: Group) -> None:
        # Waiting in an NCCL collective would keep the GPUs busy.
        self._control = dist.new_group(backend="gloo") if everyone.size > 1 else None
        self._size = everyone.size

    def exchanged(
        self, states: Sequence[int], kind: int, numbers: Sequence[int]
    ) -> tuple[Sequence[int], int, Sequence[int]]:
        """How the requests of the last piece went over all ranks, and rank 0's order: its kind, and its requests.

        ``states`` are of the same requests on every rank. What went on or ended on one rank and failed on another has
        failed.
        """
        if self._control is None:
            return states, kind, numbers
        mine = torch.full((1 + 2 * MOST_RUNNING,), -1)
        for start, values in ((0, [kind]), (1, numbers), (1 + MOST_RUNNING, states)):
            mine[start : start + len(values)] = torch.tensor(values, dtype=mine.dtype)
        every = [torch.empty_like(mine) for _ in range(self._size)]
        dist.all_gather(every, mine, group=self._control)
        kind, *rest = every[0].tolist()
        told = [each[1 + MOST_RUNNING :].tolist()[: len(states)] for each in every]
        agreed = [_worst(each) for each in zip(*told, strict=True)]
        return agreed, kind, [number for number in rest[:MOST_RUNNING] if number >= 0]

    def told(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        if self._control is not None:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]


def _worst(states: Sequence[int]) -> int:
    """What a request's states on all ranks come to: ranks of which some have read a token and some have not are apart
    for good."""
    return FAILED if APART in states and len(set(states)) > 1 else max(states)
