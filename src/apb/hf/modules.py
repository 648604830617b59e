"""The attention modules of a model, found by the names that transformers gives them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from .recurrent import recurrent_modules

_KINDS = ("Attention", "MLA")
# What modules call the index of their layer.
_INDEXES = ("layer_idx", "layer_id")
# Attention of decoders to an encoder: without one it is left out.
_TO_AN_ENCODER = "encoder_attn"


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of every layer, in order; InputError if there are none, or they are not causal."""
    recurrent = set(recurrent_modules(model))
    found = [
        module
        for name, module in model.named_modules()
        if any(hasattr(module, index) for index in _INDEXES)
        and type(module).__name__.endswith(_KINDS)
        and module not in recurrent
        and not name.endswith(_TO_AN_ENCODER)
    ]
    members = set(found)  # of one in another (GPT-Neo) the inner one attends
    found = [module for module in found if members.isdisjoint(set(module.modules()) - {module})]
    if not found:
        raise InputError(f"No attention layers were found in {type(model).__name__}; it cannot be taken over.")
    # Where modules are told that they belong to a decoder, the other may be left out (BigBirdPegasus).
    if not all(getattr(module, "is_decoder", getattr(module, "is_causal", True)) for module in found):
        raise InputError(
            f"The attention of {type(model).__name__} is not causal; use a model that generates text, or set "
            "is_decoder in its configuration if it was trained to."
        )
    return found


def idle_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of attention to an encoder, which take part in nothing."""
    whole = [module for name, module in model.named_modules() if name.endswith(_TO_AN_ENCODER)]
    return [part for module in whole for part in module.modules()]


def layer_index(model: PreTrainedModel, module: nn.Module) -> int:
    """The index of a module's layer: its own word or, where layers share weights (Zamba), the number in its name."""
    told = next((getattr(module, index) for index in _INDEXES if hasattr(module, index)), None)
    if told is not None and int(told) >= 0:
        return int(told)
    name = next(name for name, each in model.named_modules() if each is module)
    return next(int(part) for part in name.split(".") if part.isdecimal())
