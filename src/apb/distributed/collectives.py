"""The few collectives that strategies need; a group of one process is the ordinary case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.norm import RowNorm

# torch 2.13 renamed it and warns about the old name; 2.11 has only the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """A collective in flight; ``wait`` returns its result."""

    def __init__(self, result: Tensor, *works: dist.Work) -> None:
        self._result = result
        self._works = list(works)

    def wait(self) -> Tensor:
        """Block (on a GPU: make the current stream wait) until the result has arrived, and return it."""
        while self._works:
            self._works.pop().wait()
        return self._result


@dataclass(frozen=True)
class Group:
    """The processes that share a prompt; ``Group()`` is a single process without communication.

    Attributes:
        made: by device, what :func:`apb.distributed.one_shot.quick` has made of it.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    made: dict[torch.device, tuple[Group, str | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of_world(cls) -> Group:
        """All processes of torch.distributed if it is initialised, else a single one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """Start an all-gather of ``x``, of the same shape on every rank; the result is (size, *x.shape) in rank order.

        ``into``: contiguous output tensor of the result's shape; allocated if None.
        """
        if self.size == 1:
            return Pending(x.unsqueeze(0))
        result = x.new_empty((self.size, *x.shape)) if into is None else into
        flat = result.view(self.size * x.shape[0], *x.shape[1:])
        work = _all_gather(flat, x.contiguous(), group=self.process_group, async_op=True)
        return Pending(result, work)

    def in_kernels(self, x: Tensor) -> bool:
        """True if :meth:`all_gather` of ``x`` is only kernels on the current stream, which a CUDA graph captures."""
        return self.size == 1

    def shift(self, x: Tensor) -> Pending:
        """Start sending ``x`` to the next rank of the ring; the result is the previous rank's ``x``, of equal shape."""
        if self.size == 1:
            return Pending(x)
        result = torch.empty_like(x)
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=self.process_group, group_peer=after),
                dist.P2POp(dist.irecv, result, group=self.process_group, group_peer=before),
            ]
        )
        return Pending(result, *works)

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send ``parts[r]`` to rank r; the result's item r, of shape ``shapes[r]``, was received from rank r."""
        if self.size == 1:
            return list(parts)
        received = parts[0].new_empty(sum(math.prod(shape) for shape in shapes))
        dist.all_to_all_single(
            received,
            torch.cat([part.reshape(-1) for part in parts]),
            [math.prod(shape) for shape in shapes],
            [part.numel() for part in parts],
            group=self.process_group,
        )
        pieces = received.split([math.prod(shape) for shape in shapes])
        return [piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Gather ``x``, of the same shape on every rank, on rank 0 in rank order; None on the other ranks."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, group=self.process_group, group_dst=0)
        return parts

    def send(self, x: Tensor, to: int) -> Pending:
        """Start to send ``x`` to another rank, which calls :meth:`receive`; the result is ``x``."""
        operation = dist.P2POp(dist.isend, x, group=self.process_group, group_peer=to)
        return Pending(x, *dist.batch_isend_irecv([operation]))

    def receive(self, x: Tensor, source: int) -> Tensor:
        """Overwrite ``x`` with what another rank sends, and return it."""
        operation = dist.P2POp(dist.irecv, x, group=self.process_group, group_peer=source)
        return Pending(x, *dist.batch_isend_irecv([operation])).wait()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite ``x`` with rank ``source``'s on every rank, and return it."""
        if self.size > 1:
            dist.broadcast(x, group=self.process_group, group_src=source)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce ``x`` in place by summation, and return it."""
        if self.size > 1:
            dist.all_reduce(x, group=self.process_group)
        return x

    def row_sum(self, x: Tensor) -> Tensor:
        """The sum of ``x``, a row of a decode step, over the ranks; ``x`` may be overwritten."""
        return self.sum(x)

    def row_sum_onto(self, x: Tensor, residual: Tensor, norm: RowNorm | None) -> tuple[Tensor, Tensor | None]:
        """The sum of ``x`` over the ranks, as :meth:`row_sum`, and of a row that all of them have.

        Args:
            x: as in :meth:`row_sum`.
            residual: of its shape and dtype.
            norm: of the result, as wide as x; None if it is of no use.

        Returns:
            the sum, in a new tensor.
            the sum normed, where a kernel gives it along, or None.
        """
        return residual + self.row_sum(x), None

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size == 1:
            return
        group: Any = self.process_group or dist.group.WORLD
        # A group without a bound GPU, because its ranks have several, needs to be given the device to wait on.
        unbound = dist.get_backend(group) == "nccl" and group.bound_device_id is None
        dist.barrier(group=group, device_ids=[torch.cuda.current_device()] if unbound else None)
