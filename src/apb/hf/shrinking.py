"""Small copies of configurations, with every kind of layer that a model has."""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import PreTrainedConfig

HEADS = 4
WINDOW = 24
VOCABULARY = 503
POSITIONS = 128
# Settings that are lowered to these values wherever a configuration has larger ones.
_SMALL = {
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_num_experts": 4,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "linear_num_heads": 2,
    "linear_head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "mamba_chunk_size": 32,
    "chunk_size": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 16,
    "floor_scale": WINDOW,
}
_HEADS = ("decoder_attention_heads", "num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
_LAYERS = ("decoder_layers", "num_hidden_layers", "n_layer", "n_layers")
# Names of settings for a layer's window: one number for all layers, or a list.
_REACH = re.compile(r"(window|window_size|window_sizes|attention_chunk_size|local_attention)$")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrink(config: Any) -> Any:
    """A copy with few layers, heads and experts and the original head dim, in fp32 with eager attention.

    It keeps the first three layers and one of every other layer type, of layers with and without keys and values of
    their own; windows become 24 tokens, so that a short
    prompt is longer than a window.
    """
    text = config.get_text_config()
    small = copy.deepcopy(text)
    differing = _differing(text)
    if differing:
        small.per_layer_config = None
        text = text.per_layer_config[_kept_layers(text)[0]]
    heads = _first(text, _HEADS)
    hidden = _first(text, _HIDDEN)
    width = getattr(text, "head_dim", None) or hidden // heads
    layers = _kept_layers(text)
    _set(small, _LAYERS, len(layers))
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == _first(text, _LAYERS) and name != "rope_parameters":
            setattr(small, name, [value[layer] for layer in layers])
    kv_heads = _first(text, _KV_HEADS) or heads
    _set(small, _HEADS, HEADS)
    for name in _KV_HEADS:
        if hasattr(text, name):  # None may mean: as many as heads
            setattr(small, name, max(HEADS * kv_heads // heads, 1))
    follows = isinstance(getattr(type(text), "head_dim", None), property)  # from the others (Falcon)
    if hasattr(text, "head_dim") and not follows and not _latent(text):
        small.head_dim = width
    _set(small, _HIDDEN, HEADS * width if not _latent(text) else 64)
    for name, value in _SMALL.items():
        known = getattr(small, name, None)
        if isinstance(known, list):
            setattr(small, name, [min(each, value) for each in known])
        if isinstance(known, int) and not isinstance(known, bool) and known > value:
            setattr(small, name, value)
    _shrink_recurrent(text, small, layers)
    if getattr(text, "num_kv_shared_layers", None):
        small.num_kv_shared_layers = sum(layer >= _first_shared(text) for layer in layers)
    if getattr(text, "first_k_dense_replace", None):
        small.first_k_dense_replace = 1
    for name, value in vars(text).items():
        if _REACH.search(name) and value and not isinstance(value, bool):
            setattr(small, name, [WINDOW] * len(layers) if isinstance(value, (list, tuple)) else WINDOW)
    if (getattr(text, "max_position_embeddings", None) or POSITIONS) < POSITIONS:
        small.max_position_embeddings = POSITIONS
    if getattr(text, "ffn_config", None):  # DBRX
        small.attn_config.kv_n_heads = small.num_key_value_heads
        small.ffn_config.hidden_size, small.ffn_config.ffn_hidden_size = small.d_model, 96
    if getattr(text, "num_layers_per_stack", None):  # HRM, whose layers run several times
        small.num_layers_per_stack, small.num_hidden_layers = 1, small.H_cycles * (small.L_cycles + 1)
    for part in vars(small).values():  # vision and audio encoders beside the decoder are not used
        if isinstance(part, PreTrainedConfig):
            _set(part, (*_LAYERS, "num_blocks"), 1)
    for name in _SPECIAL:
        setattr(small, name, 0)
    small.vocab_size = VOCABULARY  # for prompts with ids up to that, which smaller vocabularies lack
    _set(small, ("decoder_vocab_size",), VOCABULARY)  # Marian's
    small.dtype = "float32"
    small._attn_implementation = "eager"
    if differing:
        small.per_layer_config = {
            index: {
                name: max(HEADS * value // heads, 1) if name in _KV_HEADS else value
                for name, value in differing[layer].items()
            }
            for index, layer in enumerate(layers)
        }
    return small


def _shrink_recurrent(text: Any, small: Any, layers: list[int]) -> None:
    """Lower the sizes of recurrent layers, which most families name in their own way."""
    if getattr(text, "attn_layer_period", None):  # Jamba's way to say which layers attend
        small.attn_layer_period, small.attn_layer_offset = 2, 1
    if getattr(text, "attn_layer_indices", None):  # Bamba's
        small.attn_layer_indices = [layers.index(layer) for layer in text.attn_layer_indices if layer in layers]
    if getattr(text, "linear_num_key_heads", None):
        small.linear_num_key_heads = 2
        small.linear_num_value_heads = 2 * (text.linear_num_value_heads // text.linear_num_key_heads)
    if getattr(text, "n_mamba_heads", None):  # Zamba attends to the embeddings as well, side by side with the rows
        small.attention_hidden_size, small.hidden_size = small.hidden_size, small.hidden_size // 2
    if getattr(text, "hybrid_layer_ids", None):  # Zamba2's
        small.hybrid_layer_ids = [place for place, layer in enumerate(layers) if layer in text.hybrid_layer_ids]
        small.mamba_headdim = small.mamba_expand * small.hidden_size // small.n_mamba_heads
    if getattr(text, "mamba_d_ssm", None):
        small.mamba_d_ssm = small.mamba_n_heads * small.mamba_d_head
    elif getattr(text, "mamba_n_heads", None):
        small.mamba_d_head = small.mamba_expand * small.hidden_size // small.mamba_n_heads


def _differing(text: Any) -> list[dict[str, Any]]:
    """By layer, the settings in which layers differ from one another; nothing if they do not."""
    names = getattr(text, "per_layer_attributes", None) or ()
    return [{name: getattr(each, name) for name in names} for each in text.per_layer_config] if names else []


def _latent(text: Any) -> bool:
    return bool(getattr(text, "kv_lora_rank", None))


def _kept_layers(text: Any) -> list[int]:
    """Indices of the first three layers, and of the first layer of every other type, shared or not."""
    count = _first(text, _LAYERS)
    types = getattr(text, "layer_types", None) or [None] * count
    kinds = [(kind, index >= _first_shared(text)) for index, kind in enumerate(types)]
    kept = set(range(min(3, count)))
    kept |= {kinds.index(kind) for kind in set(kinds)}
    # Those of Zamba share weights, and its code wants several.
    kept |= set([index for index, kind in enumerate(types) if kind == "hybrid"][:2])
    return sorted(kept)


def _first_shared(text: Any) -> int:
    """Index of the first layer without keys and values of its own."""
    return int(_first(text, _LAYERS)) - (getattr(text, "num_kv_shared_layers", None) or 0)


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def _set(config: Any, names: tuple[str, ...], value: int) -> None:
    for name in names:
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
