"""RoPE variants whose frequencies depend on the length: every rank must see the global one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# RoPE variants whose frequencies follow from the largest position.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def length_dependent(config: Any) -> list[str]:
    """The RoPE variants of a model whose frequencies depend on the length, by name."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Some families have one set of parameters a kind of layer.
    sets = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return sorted({str(part.get("rope_type")) for part in sets} & _LENGTH_DEPENDENT)


def pin_length(model: PreTrainedModel, total: Callable[[], int]) -> Callable[[], None]:
    """Make dynamic and longrope RoPE take their length from ``total()`` instead of the largest position they are given.

    They look at the positions of the rows at hand, which on most ranks end long before the prompt does. A position
    ``total() - 1`` is put behind the others and its row taken away from the result. Returns what undoes it.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        _forget_longer(module, total())
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _extend(kwargs["position_ids"], total())}
        return (args[0], _extend(args[1], total()), *args[2:]), kwargs

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):  # DeepSeek-V2's: cosines and sines are one complex number
            return output[..., :-1, :]
        return tuple(x[..., :-1, :] for x in output)

    handles = []
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _forget_longer(module: nn.Module, total: int) -> None:
    """Keep dynamic RoPE from using the frequencies of a longer prompt that was read before: it only ever grows them."""
    original = getattr(module, "original_max_seq_len", None)
    if original is not None and total >= original:  # below that, transformers itself goes back to the original ones
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, min(int(getattr(module, name)), total - 1))


def _extend(positions: Tensor, total: int) -> Tensor:
    last = positions.new_full((*positions.shape[:-1], 1), max(total - 1, 0))
    return torch.cat([positions, last], -1)
