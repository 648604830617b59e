"""transformers' own arithmetic in place of other packages' kernels, which run on GPUs alone."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.integrations import hub_kernels


@contextmanager
def without_kernels(model: nn.Module) -> Iterator[None]:
    """Run a model on the CPU or without numbers, whatever is installed.

    transformers' modules call flash-linear-attention, causal-conv1d and the like as soon as they can be imported, on
    any device. Within it they call the functions that these replaced.
    """
    replaced = []
    for name in {type(module).__module__ for module in model.modules()}:
        known = vars(sys.modules[name])
        for key, function in list(known.items()):
            if inspect.isfunction(function) and function.__globals__ is vars(hub_kernels):
                replaced.append((known, key, function))
                known[key] = inspect.unwrap(function)
    try:
        yield
    finally:
        for known, key, function in replaced:
            known[key] = function
