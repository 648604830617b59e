"""The hardware and software that this process runs on: names, versions, memory."""

from __future__ import annotations

import platform
import resource
import time
from dataclasses import dataclass
from importlib.metadata import version

import psutil
import torch

from . import __version__
from .planning.cost import KNOWN_CEILINGS, Ceilings
from .planning.runs import CPU_COMPOSED, GPU_COMPOSED


def device_name(device: torch.device) -> str:
    """The product name of a GPU or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def most_composed(device: torch.device) -> int:
    """Rows of a rank that recurrent layers compose on a kind of device, see :func:`apb.planning.runs.composed`."""
    return CPU_COMPOSED if device.type == "cpu" else GPU_COMPOSED


@dataclass(frozen=True)
class Hardware:
    """The properties of every rank's hardware that plans depend on.

    Attributes:
        memory: bytes that a rank may use.
        element_bytes: bytes of one number of weights, activations and cache.
        ceilings: rates the device reaches, where they are known.
        most_composed: rows of a rank that recurrent layers compose, see :func:`apb.planning.runs.composed`.
    """

    memory: int
    element_bytes: int
    ceilings: Ceilings | None
    most_composed: int = GPU_COMPOSED

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, ranks: int) -> Hardware:
        """This machine's properties: each rank has its own GPU, or a share of the host's memory."""
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            memory = psutil.virtual_memory().total // ranks
        return cls(memory, dtype.itemsize, KNOWN_CEILINGS.get(device_name(device)), most_composed(device))


def free_memory(device: torch.device, ranks: int) -> int:
    """Bytes that each rank can still take: of its GPU, or its share of what is free on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // ranks


def fingerprint(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Versions, device and dtype, without which two results cannot be compared."""
    return {
        "apb": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: what torch allocated on a GPU, or this process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queued work, so that a clock read next includes it.

    That of the current stream: what arrives on others meanwhile is waited for by the work that needs it.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Stopwatch:
    """Seconds since it was made, with a GPU's queued work finished at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronize(device)
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far."""
        synchronize(self._device)
        return time.perf_counter() - self._start
