"""Scaled RoPE: the length it supports, and the variants whose frequencies depend on the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .positions import first_position

# Families whose configurations give the stretched length, although their type of settings usually has the original.
_GIVEN_STRETCHED = ("gemma3", "gemma3_text")
_STRETCHED = ("linear", "dynamic", "yarn", "longrope", "llama3")


def parameter_sets(text: Any) -> dict[str, dict[str, Any]]:
    """The RoPE settings of a decoder's configuration by kind of layer; under "" if all layers share them."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return {kind: part for kind, part in given.items() if isinstance(part, dict)} or {"": given}


def kind(parameters: dict[str, Any]) -> str:
    """transformers' name of the RoPE type of a set of settings: "default", "linear", "yarn" and so on."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def reach(text: Any) -> int | None:
    """Number of positions that a decoder's configuration supports; None if it gives no number.

    In transformers a ``factor`` allows sequences of factor x the original length. That is
    ``original_max_position_embeddings`` if given, else ``max_position_embeddings``, which in many configurations is the
    stretched length already.
    """
    names = ("max_position_embeddings", "max_target_positions")  # the other is Whisper's
    given: int | None = next((getattr(text, name) for name in names if hasattr(text, name)), None)
    if given is None:
        return None
    sets = parameter_sets(text)
    # Sliding layers only compare positions within their window: their RoPE is no limit.
    far = [parameters for layers, parameters in sets.items() if layers != "sliding_attention"] or [*sets.values()]
    return min(_reach(parameters, given, text.model_type) for parameters in far) - first_position(text)


def _reach(parameters: dict[str, Any], given: int, model_type: str) -> int:
    factor = parameters.get("factor")
    original = parameters.get("original_max_position_embeddings") or given
    if kind(parameters) not in _STRETCHED or not factor or model_type in _GIVEN_STRETCHED:
        return given
    # Here the factor is a term of a formula and need not be the ratio of the lengths: Llama 3.2's is 32, and they are
    # 8,192 and 131,072.
    if kind(parameters) in ("longrope", "llama3") and original < given:
        return given
    return max(given, int(original * factor))


def switches(text: Any) -> list[int]:
    """Lengths beyond which longrope rotates every position by other angles, including those read before.

    Keys rotated by the old angles do not match queries rotated by the new ones, so the text must be read again, as
    transformers' models do.
    """
    sets = [parameters for parameters in parameter_sets(text).values() if kind(parameters) == "longrope"]
    return [int(parameters["original_max_position_embeddings"]) for parameters in sets]


# RoPE variants whose frequencies follow from the largest position.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def length_dependent(text: Any) -> list[str]:
    """The RoPE variants of a decoder's configuration whose frequencies depend on the length, by name."""
    return sorted({*map(kind, parameter_sets(text).values())} & _LENGTH_DEPENDENT)


def pin_length(model: PreTrainedModel, total: Callable[[], int]) -> Callable[[], None]:
    """Make dynamic and longrope RoPE take their length from ``total()`` instead of the largest position in a pass.

    On most ranks the positions of a pass end long before the prompt does. A position ``total() - 1`` is appended to
    them and its row removed from the result. Returns a function that undoes this.
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
    """Keep dynamic RoPE from using the frequencies of an earlier, longer prompt: it never shrinks them itself."""
    original = getattr(module, "original_max_seq_len", None)
    if original is not None and total >= original:  # below that, transformers itself goes back to the original ones
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, min(int(getattr(module, name)), total - 1))


def _extend(positions: Tensor, total: int) -> Tensor:
    last = positions.new_full((*positions.shape[:-1], 1), max(total - 1, 0))
    return torch.cat([positions, last], -1)
