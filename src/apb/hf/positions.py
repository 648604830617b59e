"""Embedded positions that begin behind that of the padding, as in RoBERTa's family.

Left to themselves these models count from there; a pass here gives the true positions, which begin at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_OWN = "create_position_ids_from_input_ids"


def begin_behind_padding(model: nn.Module) -> Callable[[], None]:
    """Shift the positions that a model's embeddings are given; returns a function that undoes it."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        given = kwargs.get("position_ids")
        return args, kwargs if given is None else {**kwargs, "position_ids": given + module.padding_idx + 1}

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, _OWN) and hasattr(module, "padding_idx")
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
