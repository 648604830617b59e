"""Steps that all ranks take or none: what goes wrong on one of them, every rank says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import InputError
from .collectives import Group

Result = TypeVar("Result")


def together(group: Group, device: torch.device, step: Callable[[], Result]) -> Result:
    """What a step gives on this rank, once it has succeeded on all; every rank must call it.

    Args:
        group: the ranks.
        device: where their messages are.
        step: may raise InputError, and has no collectives that it might miss then.

    Raises:
        InputError: some rank could not take the step; in the words of the first that could not, on all of them.
    """
    found: list[Result] = []
    problem: InputError | None = None
    try:
        found.append(step())
    except InputError as error:
        problem = error
    if group.size == 1:
        said = [] if problem is None else [str(problem)]
    else:
        said = [each.decode() for each in _told(group, device, str(problem or "").encode()) if each]
    if said:
        found.clear()  # it may be large
        raise InputError(said[0]) from problem
    return found[0]


def from_first(group: Group, device: torch.device, data: bytes) -> bytes:
    """Rank 0's bytes, on every rank."""
    return data if group.size == 1 else _told(group, device, data if group.rank == 0 else b"")[0]


def _told(group: Group, device: torch.device, data: bytes) -> list[bytes]:
    """Every rank's bytes, by rank."""
    lengths = group.all_gather(torch.tensor([len(data)], device=device)).wait().flatten().tolist()
    padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device=device)
    every = group.all_gather(padded).wait().cpu()
    return [bytes(each[:length].tolist()) for each, length in zip(every, lengths, strict=True)]
