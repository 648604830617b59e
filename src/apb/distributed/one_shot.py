"""Messages of some kilobytes between the GPUs of one host, by a kernel each that CUDA graphs can capture.

Every rank writes into memory that the others can read (torch's symmetric memory, without multicast), and reads what all
of them have written. Nothing runs on the host, so a captured decode step needs no pause for its messages; but a rank
that is lost leaves the others waiting on their GPUs, until whoever started them ends them.
"""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Group, Pending

# Bytes of a message at most: as many as the logits of a large vocabulary in 16 bits. Every rank reads all messages
# whole, which for larger ones is slower than NCCL.
CAPACITY = 1 << 19
_DTYPES = (torch.float32, torch.bfloat16)
# The kernel moves so many bytes at a time.
_ALIGNMENT = 16


class OneShot:
    """Sums over ranks through memory that all of them read; messages of one group follow each other on one stream."""

    def __init__(self, buffer: Tensor, group: Group) -> None:
        """Use ``buffer``, fp32, of which each rank has one that the others can read; see :func:`quick`."""
        self._buffer = buffer
        self._size = group.size
        self._name = _process_group(group).group_name
        self._mine = (torch.arange(group.size, device=buffer.device) == group.rank).unsqueeze(1)
        self._nothing = {dtype: torch.zeros((), dtype=dtype, device=buffer.device) for dtype in _DTYPES}

    def takes(self, count: int, dtype: torch.dtype) -> bool:
        """True for a sum of ``count`` numbers of this dtype."""
        size = count * dtype.itemsize
        return dtype in _DTYPES and 0 < size <= CAPACITY and size % _ALIGNMENT == 0

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """Where this rank's summands of the next message belong, (count,); to be filled and given to :meth:`summed`."""
        return self._buffer.view(dtype)[:count]

    def summed(self, room: Tensor) -> Tensor:
        """The sum over all ranks, to the bit the same on each, in a new tensor of the shape of :meth:`room`'s."""
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(room, "sum", self._name)
        return total

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks, in a new tensor."""
        room = self.room(x.numel(), x.dtype)
        room.copy_(x.reshape(-1))
        return self.summed(room).view(x.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x``, (size, *x.shape): the sum of what has one rank's numbers in each row, and zeros else."""
        room = self.room(self._size * x.numel(), x.dtype).view(self._size, -1)
        torch.where(self._mine, x.reshape(1, -1), self._nothing[x.dtype], out=room)
        return self.summed(room).view(self._size, *x.shape)


@dataclass(frozen=True, kw_only=True)
class QuickGroup(Group):
    """A group whose small messages are kernels."""

    one_shot: OneShot

    def in_kernels(self, x: Tensor) -> bool:
        """See :meth:`Group.in_kernels`."""
        return self.one_shot.takes(self.size * x.numel(), x.dtype)

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`."""
        if not self.in_kernels(x):
            return super().all_gather(x, into)
        gathered = self.one_shot.all_gather(x)
        return Pending(gathered if into is None else into.copy_(gathered))


def quick(group: Group, device: torch.device) -> tuple[Group, str | None]:
    """The group with kernels for its small messages, or as it is and the reason why; every rank calls it.

    The kernels are tried, and their results compared with those of the group's own collectives, at the first call.
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
    if reason is None:
        # Setting multicast up is no use here, and fails or does harm on some machines.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        try:
            made = QuickGroup(group.rank, group.size, group.process_group, one_shot=_one_shot(group, device))
        except Exception as error:  # whatever torch, the driver or the machine refuse, NCCL does the work
            reason = f"symmetric memory failed: {(str(error).splitlines() or [''])[0][:200]}"
        if _anywhere(group, device, reason is not None):
            return group, reason or "another rank has no symmetric memory"
        if _anywhere(group, device, not _right(made, group, device)):
            return group, "their sums differ from the collectives'"
        return made, None
    return group, reason


def _one_shot(group: Group, device: torch.device) -> OneShot:
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(CAPACITY // 4, dtype=torch.float32, device=device)
    symmetric.rendezvous(buffer, _process_group(group).group_name)
    return OneShot(buffer, group)


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


def _right(made: QuickGroup, group: Group, device: torch.device) -> bool:
    """True if sums and gathers by kernels are those of the collectives."""
    found = []
    for dtype in _DTYPES:
        x = (torch.arange(4096, device=device) % 61 - 30 + group.rank).to(dtype)  # sums that no dtype rounds
        total, every = group.sum(x.clone()), group.all_gather(x).wait()
        for _ in range(2):  # one message after the other through the same memory
            found += [torch.equal(made.one_shot.sum(x), total), torch.equal(made.one_shot.all_gather(x), every)]
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
