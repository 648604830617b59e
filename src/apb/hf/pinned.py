"""Host memory that GPUs read at full speed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

# Kernels read fastest what begins where their reads do; memory is pinned by the page.
_PAGE = 4096
# cudaHostRegisterPortable and cudaHostRegisterMapped: kernels of all GPUs may read it, at the same addresses.
_MAPPED = 1 | 2


class HostMemory:
    """A block of host memory, pinned as long as this object lives if there are GPUs that read or write it.

    torch's own pinned memory would be rounded up to a power of two.

    Attributes:
        numbers: (count,), the whole block.
    """

    def __init__(self, count: int, dtype: torch.dtype, devices: Iterable[torch.device]) -> None:
        """Room for ``count`` numbers; ``devices``: the GPUs."""
        block = torch.empty(count + _PAGE // dtype.itemsize, dtype=dtype)
        start = -block.data_ptr() % _PAGE // dtype.itemsize
        self.numbers: Tensor = block[start : start + count]
        gpus = {device for device in devices if device.type == "cuda"}
        if not gpus or not count:
            return
        address = self.numbers.data_ptr()
        with torch.cuda.device(next(iter(gpus))):  # torch takes it for this GPU's, where it is told to read it in place
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, self.numbers.nbytes, _MAPPED))
        # The finalizer holds the block itself, which must not be freed while it is registered.
        weakref.finalize(self, _unpin, self.numbers, gpus).atexit = False


def _unpin(numbers: Tensor, devices: Iterable[torch.device]) -> None:
    for device in devices:  # nothing may be on its way
        torch.cuda.synchronize(device)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(numbers.data_ptr()))
