"""What this process runs on: names, versions, memory."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version

import torch

from . import __version__


def device_name(device: torch.device) -> str:
    """The product name of a GPU or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fingerprint(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Versions, device and dtype: what one must know to compare two results."""
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
    """Wait for a GPU's queued work, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
