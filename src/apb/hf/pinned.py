"""Host memory that GPUs read at full speed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor


class HostMemory:
    """A block of host memory, pinned as long as this object lives if there are GPUs that read or write it.

    torch's own pinned memory would be rounded up to a power of two.

    Attributes:
        numbers: (count,), the whole block.
    """

    def __init__(self, count: int, dtype: torch.dtype, devices: Iterable[torch.device]) -> None:
        """Room for ``count`` numbers; ``devices``: the GPUs."""
        self.numbers: Tensor = torch.empty(count, dtype=dtype)
        gpus = {device for device in devices if device.type == "cuda"}
        if not gpus or not count:
            return
        address = self.numbers.data_ptr()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, self.numbers.nbytes, 0))
        # The finalizer holds the block itself, which must not be freed while it is registered.
        weakref.finalize(self, _unpin, self.numbers, gpus).atexit = False


def _unpin(numbers: Tensor, devices: Iterable[torch.device]) -> None:
    for device in devices:  # nothing may be on its way
        torch.cuda.synchronize(device)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(numbers.data_ptr()))
