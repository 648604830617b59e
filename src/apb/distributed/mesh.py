"""Two-dimensional process mesh: ranks share the sequence, and the processes of a rank share the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import InputError
from .collectives import Group
from .launch import join


@dataclass(frozen=True)
class Mesh:
    """The groups that this process belongs to.

    Attributes:
        sequence: the processes that hold the same share of the weights, one per rank: they share the prompt.
        tensor: the processes of this rank, which share the weights; consecutive ranks, so on the fastest links.
        everyone: all processes.
        devices: torch's mesh of the tensor group; None without tensor parallelism.
    """

    sequence: Group
    tensor: Group
    everyone: Group
    devices: DeviceMesh | None = None

    @classmethod
    def of(cls, group: Group) -> Mesh:
        """The mesh of a group of processes that each hold all weights."""
        return cls(group, Group(), group)

    @classmethod
    def join(cls, device: torch.device, tensor_parallel: int = 1, gpus: int = 1) -> Mesh:
        """The mesh of all processes, ``tensor_parallel`` of them per rank.

        ``gpus``: as in :func:`apb.distributed.launch.join`.

        Raises:
            InputError: the number of processes is no multiple of ``tensor_parallel``.
        """
        everyone = join(device, gpus)
        if tensor_parallel == 1:
            return cls.of(everyone)
        if tensor_parallel < 1 or everyone.size % tensor_parallel:
            raise InputError(
                f"{everyone.size} processes cannot be divided into ranks of {tensor_parallel} (--tensor-parallel); "
                f"start a multiple of {tensor_parallel}."
            )
        shape = (everyone.size // tensor_parallel, tensor_parallel)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("sequence", "tensor"))
        return cls(_group(mesh["sequence"]), _group(mesh["tensor"]), everyone, mesh["tensor"])


def _group(mesh: DeviceMesh) -> Group:
    process_group = mesh.get_group()
    return Group(dist.get_rank(process_group), dist.get_world_size(process_group), process_group)
