"""CUDA graphs without a GPU: what is captured is noted, operation by operation, and run again at every replay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph. Until it is replayed, what was captured holds not-a-number."""

    def capture_begin(self, pool: Any) -> None:
        """What follows is captured."""
        self._calls: list[tuple[Any, Any, Any, Tensor]] = []
        self.__enter__()

    def capture_end(self) -> None:
        """No longer."""
        self.__exit__(None, None, None)

    def replay(self) -> None:
        """Every operation again, from the same tensors to the same tensors."""
        for operation, arguments, options, result in self._calls:
            result.copy_(operation(*arguments, **options))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation that makes a tensor; views need no replay, and others are not known here."""
        result = func(*args, **(kwargs or {}))
        assert isinstance(result, Tensor), f"{func} is not one tensor"
        given = [x for part in args for x in (part if isinstance(part, list) else [part]) if isinstance(x, Tensor)]
        if all(x.untyped_storage().data_ptr() != result.untyped_storage().data_ptr() for x in given):
            if given:  # others are memory that nothing was written to yet
                self._calls.append((func, args, kwargs or {}, result))
            result.fill_(math.nan)
        else:
            assert func.is_view, f"{func} writes where it reads"
        return result


@contextmanager
def standing_in() -> Iterator[None]:
    """Within it, CUDA graphs are :class:`Graph`, and streams nothing."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "CUDAGraph", Graph))
        for name in ("Stream", "stream", "current_stream", "synchronize", "empty_cache", "graph_pool_handle"):
            stack.enter_context(patch.object(torch.cuda, name, MagicMock()))
        yield
