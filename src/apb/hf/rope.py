"""RoPE that is stretched: how far it reaches, and the variants whose frequencies depend on the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Families whose configurations give the stretched length, although settings of their type come with the original one.
_GIVEN_STRETCHED = ("gemma3", "gemma3_text")
_STRETCHED = ("linear", "dynamic", "yarn", "longrope", "llama3")


def parameter_sets(text: Any) -> dict[str, dict[str, Any]]:
    """The RoPE settings of a decoder's configuration by kind of layer; under "" where all layers have the same."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return {kind: part for kind, part in given.items() if isinstance(part, dict)} or {"": given}


def kind(parameters: dict[str, Any]) -> str:
    """transformers' name of what a set of settings does: "default", "linear", "yarn" and so on."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def reach(text: Any) -> int | None:
    """How many positions the settings of a decoder's configuration are for; None where it says nothing.

    In transformers' words a ``factor`` serves sequences of factor x the original length. That is
    ``original_max_position_embeddings`` where it is given, else ``max_position_embeddings``, which in many
    configurations is the stretched length already.
    """
    given: int | None = getattr(text, "max_position_embeddings", None)
    if given is None:
        return None
    sets = parameter_sets(text)
    # Sliding layers compare positions within their window alone: how far their RoPE reaches is no limit.
    far = [parameters for layers, parameters in sets.items() if layers != "sliding_attention"] or [*sets.values()]
    return min(_reach(parameters, given, text.model_type) for parameters in far)


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
    """Lengths beyond which longrope turns every position by other angles, those read before included.

    What was read with the ones cannot be attended to with the others; transformers' models have it read again.
    """
    sets = [parameters for parameters in parameter_sets(text).values() if kind(parameters) == "longrope"]
    return [int(parameters["original_max_position_embeddings"]) for parameters in sets]


# RoPE variants whose frequencies follow from the largest position.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def length_dependent(config: Any) -> list[str]:
    """The RoPE variants of a model whose frequencies depend on the length, by name."""
    return sorted({*map(kind, parameter_sets(config.get_text_config()).values())} & _LENGTH_DEPENDENT)


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
