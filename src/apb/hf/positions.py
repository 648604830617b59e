"""Embedded positions that models count in a way of their own, where a pass here has true ones that begin at 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .cache_names import takes_length

_OWN = "create_position_ids_from_input_ids"
# RoBERTa's family.
_BEHIND_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def first_position(text: Any) -> int:
    """What transformers calls the position of the first token, by a decoder's configuration: 0, or behind the padding's
    where the table of positions begins with those."""
    return (text.pad_token_id or 0) + 1 if text.model_type in _BEHIND_PADDING else 0


def set_positions(model: nn.Module, positions: Callable[[], Tensor | None]) -> Callable[[], None]:
    """Have embedded positions be those of a pass, (1, rows) or None outside; returns a function that undoes it.

    InputError if a module of the model counts its positions and takes no others.
    """

    def behind_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """RoBERTa's family begins behind the position of the padding."""
        given = kwargs.get("position_ids")
        return args, kwargs if given is None else {**kwargs, "position_ids": given + module.padding_idx + 1}

    def from_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        given = positions()
        # One dimension, because some of these tables add that of the batch.
        return args, kwargs if given is None else {**kwargs, "position_ids": given[0]}

    shifted, counting = [], []
    for module in model.modules():
        # Tables of positions, as BART's, are told the length of the cache, which is a shard here, and maybe positions.
        counts = takes_length(module.forward)
        if counts and "position_ids" not in inspect.signature(module.forward).parameters:
            raise InputError(
                f"{type(module).__name__} counts positions from the length of the cache on, where a rank has a part of "
                "it: this model cannot be read here."
            )
        if hasattr(module, _OWN) and hasattr(module, "padding_idx"):
            shifted.append(module)
        elif counts and isinstance(module, nn.Embedding):
            counting.append(module)
    handles = [module.register_forward_pre_hook(behind_padding, with_kwargs=True) for module in shifted]
    handles += [module.register_forward_pre_hook(from_pass, with_kwargs=True) for module in counting]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
