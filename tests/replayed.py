"""CUDA graphs without a GPU: what is captured is noted, operation by operation, and run again at every replay.

Kernels of Triton, which its interpreter runs here, are noted with their arguments: tensors by address, numbers as they
were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interpreting import prepare_once


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph. Until it is replayed, what was captured holds not-a-number."""

    capturing: Graph | None = None

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        """What follows is captured."""
        self.calls: list[Callable[[], Any]] = []
        Graph.capturing = self
        self.__enter__()

    def capture_end(self) -> None:
        """No longer."""
        self.__exit__(None, None, None)
        Graph.capturing = None

    def replay(self) -> None:
        """Every operation again, from the same tensors to the same tensors."""
        with torch.no_grad():
            for call in self.calls:
                call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation that makes tensors, or that writes into its first; views need no replay."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":  # sent at once as well: processes that share weights capture at the same time

            def send_again() -> None:
                func(*args, **kwargs)[1].wait()

            self.calls.append(send_again)
            return func(*args, **kwargs)
        if "out" in kwargs:
            self.calls.append(partial(func, *args, **kwargs))
            return kwargs["out"]
        if func._schema.is_mutable:
            assert func._schema.name.endswith("_"), f"{func} writes elsewhere than into its first tensor"
            self.calls.append(partial(func, *args, **kwargs))
            return args[0]
        assert not _waits(func, args), f"{func} has the host wait for what is computed"
        result = func(*args, **kwargs)
        if func.is_view or func is torch.ops.aten._unsafe_view.default:
            return result
        made = [result] if isinstance(result, Tensor) else list(result)
        assert all(isinstance(part, Tensor) for part in made), f"{func} gives more than tensors"

        def make_again() -> None:
            again = func(*args, **kwargs)
            for part, value in zip(made, [again] if isinstance(again, Tensor) else again, strict=True):
                part.copy_(value)

        if "empty" not in str(func):  # that is memory that nothing was written to yet
            self.calls.append(make_again)
        for part in made:
            if part.is_floating_point():
                part.fill_(math.nan)
        return result


def _waits(func: Any, args: Any) -> bool:
    """True if an operation has the host wait for the device: of what it gives, the number or the size is computed."""
    if func is torch.ops.aten.index.Tensor:  # with places, not with a choice, it does not
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags))


@contextmanager
def standing_in() -> Iterator[None]:
    """Within it, CUDA graphs are :class:`Graph`, and streams nothing."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "CUDAGraph", Graph))
        for name in ("Stream", "stream", "current_stream", "synchronize", "empty_cache", "graph_pool_handle"):
            stack.enter_context(patch.object(torch.cuda, name, MagicMock()))
        if find_spec("triton"):
            from triton.runtime.interpreter import GridExecutor

            prepare_once()
            launch = GridExecutor.__call__

            def launch_or_note(executor: Any, *args: Any, **kwargs: Any) -> None:
                if Graph.capturing is None:
                    launch(executor, *args, **kwargs)
                else:
                    Graph.capturing.calls.append(partial(launch, executor, *args, **kwargs))

            stack.enter_context(patch.object(GridExecutor, "__call__", launch_or_note))
        yield
