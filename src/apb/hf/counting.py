"""Model sizes for the cost model, counted on the configuration and on modules without weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, first_line
from ..planning.shape import ModelShape, Recurrent
from . import placement
from .composing import composable
from .config import expands, head_dim, kv_heads, query_heads, shared_layers, value_dim, vocabulary
from .modules import attention_modules, idle_modules
from .recurrent import recurrent_modules, state_of
from .windows import chunked, layer_count, layer_windows

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k")
# Cached by configuration and number of GPUs.
_SHAPES: dict[tuple[str, int], ModelShape] = {}


def model_shape(config: Any, gpus: int = 1) -> ModelShape:
    """The :class:`ModelShape` of a configuration, counted on modules on the meta device: no weights are allocated.

    With several ``gpus`` it includes the split of the layers over them.

    Raises:
        InputError: transformers cannot build a model from this configuration.
    """
    known = config.to_json_string(use_diff=False), gpus
    if known not in _SHAPES:
        _SHAPES[known] = _count(config, gpus)
    return _SHAPES[known]


def _count(config: Any, gpus: int) -> ModelShape:
    text = config.get_text_config()
    try:
        model = placement.without_weights(config)
    except Exception as error:  # the model's code may raise anything on values it was not written for
        raise InputError(
            f"No {config.model_type!r} model can be built from this configuration: {first_line(error)}; correct it."
        ) from error
    latent = getattr(text, "kv_lora_rank", None)
    split: tuple[tuple[int, int], ...] = ()
    if gpus > 1:
        split = placement.split(model, attention_modules(model), placement.balanced(model, gpus, torch.bfloat16))
    apart = {id(model.get_input_embeddings()), id(model.get_output_embeddings()), *map(id, idle_modules(model))}
    return ModelShape(
        layers=layer_count(config),
        heads=query_heads(config),
        kv_heads=query_heads(config) if latent else kv_heads(config),
        head_dim=head_dim(config),
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        vocabulary=vocabulary(config),
        layer_parameters=sum(_multiplied(module, text) for module in model.modules() if id(module) not in apart),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        reach=tuple(layer_windows(text)),
        chunked=chunked(text),
        near=_near(config),
        cache_width=latent + text.qk_rope_head_dim if latent else _cache_width(config),
        expands=expands(config),
        attending=len(attention_modules(model)) if recurrent_modules(model) else 0,
        recurrent=_recurrent(model, text),
        expert_row=_expert_row(model, text),
        split=split,
    )


def _intermediate(text: Any) -> int:
    """Width of the MLPs, of the widest if layers differ."""
    width = getattr(text, "intermediate_size", None) or getattr(text, "decoder_ffn_dim", None) or 4 * text.hidden_size
    return int(max(width) if isinstance(width, (list, tuple)) else width)


def _near(config: Any) -> tuple[int, int] | None:
    """(kv_heads, head_dim) of the layers with a window; None if the others have the same."""
    sizes = {
        (kv_heads(config, layer), head_dim(config, layer))
        for layer, window in enumerate(layer_windows(config.get_text_config()))
        if window is not None
    }
    return max(sizes) if sizes - {(kv_heads(config), head_dim(config))} else None


def _cache_width(config: Any) -> int:
    """Average over the layers of the numbers that a token takes in the cache; 0 if that is two heads' in each."""
    widths = [
        kv_heads(config, layer) * (head_dim(config, layer) + value_dim(config, layer)) if shared is None else 0
        for layer, shared in enumerate(shared_layers(config))
    ]
    same = set(widths) == {2 * kv_heads(config) * head_dim(config)}
    return 0 if same else math.ceil(sum(widths) / len(widths))


def _recurrent(model: PreTrainedModel, text: Any) -> Recurrent | None:
    """The recurrent layers, of which all have states of the same shapes."""
    modules = recurrent_modules(model)
    if not modules:
        return None
    parts = [part for module in modules for part in state_of(module.to(torch.bfloat16), text).tensors().values()]
    wide = sum(part.numel() for part in parts if part.dtype == torch.float32)
    composables = [by(module.forward) for module in modules if (by := composable(module, module.forward)) is not None]
    return Recurrent(
        parameters=sum(_multiplied(part, text) for module in modules for part in module.modules()),
        narrow=sum(part.numel() for part in parts) - wide,
        wide=wide,
        layers=len(modules),
        written=sum(
            part.out_features for module in modules for part in module.modules() if isinstance(part, torch.nn.Linear)
        ),
        effect=sum(math.prod(runs.effect) for runs in composables),
        lookback=composables[0].lookback if composables else 0,
    )


def _expert_row(model: PreTrainedModel, text: Any) -> int:
    """Elements per token in a layer of experts: the token's copies, and each expert's gate, up, product and output."""
    if not any(type(module).__name__.endswith("Experts") for module in model.modules()):
        return 0
    width = getattr(text, "moe_intermediate_size", None) or _intermediate(text)
    return _experts_used(text) * (2 * text.hidden_size + 3 * width)


def _experts_used(text: Any) -> int:
    """Number of experts per token; all of them where unused ones get rows of zeros."""
    if text.model_type == "llama4_text":
        return int(text.num_local_experts)
    settings = getattr(text, "ffn_config", text)  # DBRX
    return next((x for name in _EXPERTS_PER_TOKEN if (x := getattr(settings, name, None))), 1)


def _multiplied(module: torch.nn.Module, text: Any) -> int:
    """Number of weights of a module, without its submodules, that each row is multiplied with."""
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        return module.weight.numel()
    stacked = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3]
    if not stacked or not type(module).__name__.endswith("Experts"):
        return 0
    used = _experts_used(text)
    return sum(weight.numel() // weight.shape[0] * min(used, weight.shape[0]) for weight in stacked)
