"""Where kernels of Triton are launched, which is not told by their arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_HERE = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Within it, kernels are launched on the device of ``x``."""
    # Changing the device costs the host as much as a launch, hundreds of times in a decode step.
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)
