"""Ranks as threads of this process, for tests of small models: they cost no start, and each has a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from apb.distributed.collectives import Group, Pending

PATIENCE = 60.0  # seconds that a rank waits for another one before it fails


@dataclass(frozen=True)
class Together(Group):
    """A group of threads. What a rank sends to another one arrives in the order in which it was sent."""

    wires: dict[tuple[int, int], Queue[Tensor]] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)  # bytes, one entry a message

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`."""
        result = torch.stack(self._exchange([x] * self.size))
        return Pending(result if into is None else into.copy_(result))

    def shift(self, x: Tensor) -> Pending:
        """See :meth:`Group.shift`."""
        self._put(x, (self.rank + 1) % self.size)
        return Pending(self._get((self.rank - 1) % self.size))

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """See :meth:`Group.all_to_all`."""
        received = self._exchange(parts)
        assert [list(part.shape) for part in received] == [list(shape) for shape in shapes]
        return received

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """See :meth:`Group.gather`."""
        parts = self._exchange([x] * self.size)
        return parts if self.rank == 0 else None

    def send(self, x: Tensor, to: int) -> Pending:
        """See :meth:`Group.send`."""
        self._put(x, to)
        return Pending(x)

    def receive(self, x: Tensor, source: int) -> Tensor:
        """See :meth:`Group.receive`."""
        return x.copy_(self._get(source))

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """See :meth:`Group.broadcast`."""
        return x.copy_(self._exchange([x] * self.size)[source])

    def sum(self, x: Tensor) -> Tensor:
        """See :meth:`Group.sum`."""
        return x.copy_(torch.stack(self._exchange([x] * self.size)).sum(0))

    def barrier(self) -> None:
        """See :meth:`Group.barrier`."""
        self._exchange([torch.empty(0)] * self.size)

    def _exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        for rank, part in enumerate(parts):
            self._put(part, rank)
        return [self._get(rank) for rank in range(self.size)]

    def _put(self, x: Tensor, to: int) -> None:
        self.sent.append(x.nbytes)
        self.wires[self.rank, to].put(x.clone())

    def _get(self, source: int) -> Tensor:
        return self.wires[source, self.rank].get(timeout=PATIENCE)


def together(work: Callable[[Group], Any], size: int) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks at work together."""
    wires: dict[tuple[int, int], Queue[Tensor]] = {(a, b): Queue() for a in range(size) for b in range(size)}
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, Together(rank, size, None, wires)) for rank in range(size)]
        problems = [error for future in futures if (error := future.exception()) is not None]
        if problems:  # those that only waited in vain for another rank are not the reason
            raise min(problems, key=lambda error: type(error).__name__ == "Empty")
        return [future.result() for future in futures]
