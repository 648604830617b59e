"""Messages of some kilobytes between the GPUs of one host, by a kernel each that CUDA graphs can capture.

Every rank writes into memory that all of them see (torch's symmetric memory, without multicast), by a kernel of this
package or by torch's. Nothing runs on the host, so a captured decode step needs no pause for its messages; but a rank
that is lost leaves the others waiting on their GPUs, until whoever started them ends them.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.norm import RowNorm
from .collectives import Group, Pending

# Bytes of a message at most: as many as the logits of a large vocabulary in 16 bits. Every rank reads all messages
# whole, which for larger ones is slower than NCCL; and this package's kernel writes twice their bytes.
CAPACITY = 1 << 19
EXCHANGED = 1 << 16
_DTYPES = (torch.float32, torch.bfloat16)
# Numbers of the messages that are tried.
_COUNTS = (4096, 96, 4096)
# How far apart two ways to norm a row may be in 16 bits.
_ROUNDING = 0.02
# torch's kernel moves so many bytes at a time.
_ALIGNMENT = 16
# How often a program looks for what others send: while it is tried, about a second; then for ever.
_TRIED, _TRUSTED = 1 << 20, 1 << 62


class Kernels(Protocol):
    """A kind of kernel for messages of one group, which follow each other on one stream."""

    def takes(self, x: Tensor, gather: bool) -> bool:
        """True if ``x`` can be summed up, or gathered."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks in a new tensor, to the bit the same on each."""

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x``, (ranks, *x.shape)."""

    def sum_onto(self, x: Tensor, residual: Tensor, norm: RowNorm | None) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Group.row_sum_onto`."""


class Exchange:
    """This package's kernel, for the smaller messages: see :mod:`apb.kernels.exchange`."""

    def __init__(self, group: Group, device: torch.device) -> None:
        """Every rank makes one; it is not to be trusted before :meth:`trust`."""
        from ..kernels import exchange  # needs Triton

        self._kernels = exchange
        self._rank = group.rank
        # Two areas: programs that have a whole row count messages of their own.
        words = exchange.words_of(EXCHANGED, group.size)
        room = words + exchange.words_of(4 * exchange.ROW_WORDS, group.size)
        self._memory, handle = _symmetric(room, torch.long, group, device)
        self._counted = exchange.counters(EXCHANGED, 1, device)
        self._counted_rows = exchange.row_counters(1, device)
        # Compiled before any rank waits for another: all by itself, each program gives up at once.
        self._place([self._memory.data_ptr()] * group.size, words, device)
        for dtype in _DTYPES:
            for count in _COUNTS:
                row = torch.zeros(count, dtype=dtype, device=device)
                self.sum(row)
                self.all_gather(row)
                self.sum_onto(row, row, RowNorm(row, 1.0, offset=False, rounded=True))
        self._memory.zero_()
        for counted in (self._counted, self._counted_rows):
            counted.zero_()[-1] = _TRIED
        self._place(handle.buffer_ptrs, words, device)
        torch.cuda.synchronize(device)

    def _place(self, addresses: list[int], words: int, device: torch.device) -> None:
        """Where every rank's memory is; rows have theirs behind so many words."""
        self._peers = torch.tensor(addresses, device=device)
        self._row_peers = self._peers + words * torch.long.itemsize

    def trust(self) -> None:
        """From now on others are waited for however long they take."""
        for counted in (self._counted, self._counted_rows):
            counted[-1] = _TRUSTED

    def takes(self, x: Tensor, gather: bool) -> bool:
        """See :meth:`Kernels.takes`."""
        size = x.numel() * x.element_size()
        return x.dtype in _DTYPES and 0 < size <= EXCHANGED and size % 4 == 0

    def sum(self, x: Tensor) -> Tensor:
        """See :meth:`Kernels.sum`."""
        return self._kernels.exchange(x.contiguous(), self._peers, self._counted, self._rank, False)

    def all_gather(self, x: Tensor) -> Tensor:
        """See :meth:`Kernels.all_gather`."""
        return self._kernels.exchange(x.contiguous(), self._peers, self._counted, self._rank, True)

    def sum_onto(self, x: Tensor, residual: Tensor, norm: RowNorm | None) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Kernels.sum_onto`."""
        fits = x.numel() * x.element_size() <= 4 * self._kernels.ROW_WORDS
        if norm is None or not fits or norm.weight.dtype != x.dtype:
            return residual + self.sum(x), None
        row = x.contiguous(), residual.contiguous()
        return self._kernels.sum_onto(*row, norm, self._row_peers, self._counted_rows, self._rank)


class OneShot:
    """torch's kernel, which reads what all ranks have written and sums it up."""

    def __init__(self, group: Group, device: torch.device) -> None:
        """Every rank makes one."""
        self._buffer, _ = _symmetric(CAPACITY // 4, torch.float32, group, device)
        self._size = group.size
        self._name = _process_group(group).group_name
        self._mine = (torch.arange(group.size, device=device) == group.rank).unsqueeze(1)
        self._nothing = {dtype: torch.zeros((), dtype=dtype, device=device) for dtype in _DTYPES}

    def trust(self) -> None:
        """There is nothing to change."""

    def takes(self, x: Tensor, gather: bool) -> bool:
        """See :meth:`Kernels.takes`."""
        size = x.numel() * x.element_size() * (self._size if gather else 1)
        return x.dtype in _DTYPES and 0 < size <= CAPACITY and size % _ALIGNMENT == 0

    def sum(self, x: Tensor) -> Tensor:
        """See :meth:`Kernels.sum`."""
        room = self._room(x.numel(), x.dtype)
        room.copy_(x.reshape(-1))
        return self._summed(room).view(x.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        """See :meth:`Kernels.all_gather`: the sum of what has one rank's numbers in each row, and zeros else."""
        room = self._room(self._size * x.numel(), x.dtype).view(self._size, -1)
        torch.where(self._mine, x.reshape(1, -1), self._nothing[x.dtype], out=room)
        return self._summed(room).view(self._size, *x.shape)

    def sum_onto(self, x: Tensor, residual: Tensor, norm: RowNorm | None) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Kernels.sum_onto`."""
        return residual + self.sum(x), None

    def _room(self, count: int, dtype: torch.dtype) -> Tensor:
        return self._buffer.view(dtype)[:count]

    def _summed(self, room: Tensor) -> Tensor:
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(room, "sum", self._name)
        return total


@dataclass(frozen=True, kw_only=True)
class QuickGroup(Group):
    """A group whose small messages are kernels, by the first kind that takes them.

    Attributes:
        kinds: see :class:`Kernels`.
    """

    kinds: tuple[Kernels, ...]

    def in_kernels(self, x: Tensor) -> bool:
        """See :meth:`Group.in_kernels`."""
        return self._kind(x, gather=True) is not None

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`."""
        kind = self._kind(x, gather=True)
        if kind is None:
            return super().all_gather(x, into)
        gathered = kind.all_gather(x)
        return Pending(gathered if into is None else into.copy_(gathered))

    def row_sum(self, x: Tensor) -> Tensor:
        """See :meth:`Group.row_sum`."""
        kind = self._kind(x, gather=False)
        return self.sum(x) if kind is None else kind.sum(x)

    def row_sum_onto(self, x: Tensor, residual: Tensor, norm: RowNorm | None) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Group.row_sum_onto`."""
        kind = self._kind(x, gather=False)
        return super().row_sum_onto(x, residual, norm) if kind is None else kind.sum_onto(x, residual, norm)

    def _kind(self, x: Tensor, gather: bool) -> Kernels | None:
        return next((kind for kind in self.kinds if kind.takes(x, gather)), None)


def quick(group: Group, device: torch.device) -> tuple[Group, str | None]:
    """The group with kernels for its small messages, and what cannot be had of that; every rank calls it.

    The kernels are tried, and their results compared with those of the group's own collectives, at the first call.

    Returns:
        the group, as it is if it has no kernels.
        a reason, where kernels of either kind are missing.
    """
    if group.size == 1:
        return group, "there is one rank"
    if device.type != "cuda":
        return group, f"device type {device.type} has none"
    if device not in group.made:
        group.made[device] = _made(group, device)
    return group.made[device]


def _made(group: Group, device: torch.device) -> tuple[Group, str | None]:
    reason = _why_not(group, device)
    if reason is not None:
        return group, reason
    # Setting multicast up is no use here, and fails or does harm on some machines.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    kinds: list[Kernels] = []
    reasons = []
    for kind in (Exchange, OneShot):
        made, reason = _tried(kind, group, device)
        if made is None:
            reasons.append(f"{kind.__name__}: {reason}")
        else:
            kinds.append(made)
    told = "; ".join(reasons) or None
    if not kinds:
        return group, told
    return QuickGroup(group.rank, group.size, group.process_group, kinds=tuple(kinds)), told


def _tried(
    kind: Callable[[Group, torch.device], Exchange | OneShot], group: Group, device: torch.device
) -> tuple[Kernels | None, str | None]:
    """Kernels that every rank has and that are right, or a reason."""
    made, reason = None, None
    try:
        made = kind(group, device)
    except Exception as error:  # whatever torch, the driver or the machine refuse, NCCL does the work
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if _anywhere(group, device, made is None) or made is None:
        return None, reason or "another rank has none"
    if _anywhere(group, device, not _right(made, group, device)):
        return None, "its results are not the collectives'"
    made.trust()
    return made, None


def _symmetric(count: int, dtype: torch.dtype, group: Group, device: torch.device) -> tuple[Tensor, Any]:
    """Memory that all ranks see, (count,), and torch's handle with the addresses of each; every rank calls it."""
    import torch.distributed._symmetric_memory as symmetric

    # Not from a pool, in which the memory of two groups would lie side by side behind one address.
    memory: Tensor = symmetric._SymmetricMemory.empty_strided_p2p((count,), (1,), dtype, device)
    handle = symmetric.rendezvous(memory, _process_group(group).group_name)
    if handle.buffer_ptrs[group.rank] != memory.data_ptr():
        raise RuntimeError("symmetric memory lies elsewhere than torch says")
    return memory, handle


def _why_not(group: Group, device: torch.device) -> str | None:
    """A reason that all ranks find, before anything is tried in which one could wait for another in vain."""
    mine = [
        int(not hasattr(torch.ops.symm_mem, "one_shot_all_reduce")),
        _number(_host()),
        _number(str(torch.cuda.get_device_properties(device).uuid)),
        _number(os.environ.get("CUDA_VISIBLE_DEVICES", "")),
        device.index,
    ]
    told = group.all_gather(torch.tensor(mine, device=device)).wait().tolist()
    lacking, hosts, gpus, visible, indices = zip(*told, strict=True)
    if any(lacking):
        return "torch has no such kernels"
    if len(set(hosts)) > 1:
        return "the ranks are on several hosts"
    if len(set(gpus)) < group.size:
        return "ranks share a GPU"
    apart = len(set(visible)) == 1 and any(
        one != other and not torch.cuda.can_device_access_peer(one, other) for one in indices for other in indices
    )
    return "GPUs cannot read each other's memory" if apart else None


def _right(made: Kernels, group: Group, device: torch.device) -> bool:
    """True if sums and gathers by kernels are those of the collectives, one message after the other."""
    found = []
    for dtype in _DTYPES:
        for count in _COUNTS:
            x = (torch.arange(count, device=device) % 61 - 30 + group.rank).to(dtype)  # sums that no dtype rounds
            total, every = group.sum(x.clone()), group.all_gather(x).wait()
            onto, normed = made.sum_onto(x, x, norm := RowNorm(torch.ones_like(x), 1.0, offset=False, rounded=True))
            found += [torch.equal(made.sum(x), total), torch.equal(made.all_gather(x), every)]
            found.append(torch.equal(onto, total + x))
            found.append(normed is None or torch.allclose(normed, norm.of(onto), rtol=_ROUNDING, atol=_ROUNDING))
    return all(found)


def _anywhere(group: Group, device: torch.device, mine: bool) -> bool:
    return bool(group.sum(torch.tensor([int(mine)], device=device)).item())


def _process_group(group: Group) -> dist.ProcessGroup:
    found = group.process_group or dist.group.WORLD
    assert found is not None, "several ranks have a process group"
    return found


def _host() -> str:
    """The same for processes that can pass each other handles: of one running system, in one container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (boot.read_text() if boot.exists() else "")


def _number(text: str) -> int:
    """A number to compare texts by, which fits into int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
