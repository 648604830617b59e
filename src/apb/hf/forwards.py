"""Replacement of modules' ``forward``, with the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def replace_forwards(
    modules: Sequence[nn.Module], made: Callable[[nn.Module], Callable[..., Any]]
) -> Callable[[], None]:
    """Give every module the ``forward`` that ``made`` makes of it; returns a function that undoes it."""
    before = [vars(module).get("forward") for module in modules]  # a compiled one, or another library's
    for module in modules:
        module.forward = made(module)

    def undo() -> None:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward

    return undo
