"""Which models can be read, by their configurations; what it takes to know more, a small copy shows."""

from __future__ import annotations

import re
from typing import Any

from ..errors import InputError, first_line
from .cache_names import cache_name
from .config import head_dim
from .decoders import decoder_class
from .wrappers import is_wrapper

# Families with recurrent layers that have been compared with transformers' own reading.
RECURRENT_FAMILIES = {
    "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "jamba", "nemotron_h", "granitemoehybrid",
    "falcon_h1", "lfm2", "lfm2_moe", "lfm3", "bamba", "zamba", "zamba2", "kimi_linear", "minimax", "bailing_hybrid",
    "lara_mini",
}  # fmt: skip
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_RECURRENT = {"linear_attention", "conv", "hybrid", "mamba", "mlp", "moe"}
# Families that always have ALiBi; others have a setting for it.
_ALIBI = {"bloom", "mpt"}
# Settings of recurrent layers: those of Mamba, RWKV and related models.
_RECURRENT_SETTING = re.compile(r"mamba|ssm|state_size|linear_attn|linear_conv|lru_|wkv|conv_L_cache|recurrent|xlstm")


def check_supported(config: Any) -> None:
    """InputError, naming the model and the reason, where its attention cannot be taken over."""
    name = config.model_type
    other = InputError(
        f"Models of type {name!r} are not causal decoders of text alone, and none inside them has been compared with "
        "the whole model; name a model that generates text."
    )
    try:
        text = config.get_text_config()
    except ValueError as error:  # a text encoder beside the decoder
        raise other from error
    kind = decoder_class(text)
    loads = kind is not None and decoder_class(config) is not None
    if is_wrapper(config) and not loads:
        raise InputError(
            f"{name!r} models are multimodal; apb reads with the text decoder inside them: give Engine.from_pretrained "
            "the checkpoint, which loads that alone."
        )
    if not loads and not getattr(config, "auto_map", None):
        raise other
    if getattr(text, "is_encoder_decoder", False):
        raise InputError(
            f"{name!r} models write from what an encoder has read, in both directions and as one; name a model that "
            "generates text alone, or set is_encoder_decoder to false if this is a decoder that was trained alone."
        )
    _check_layers(name, text)
    if kind is not None and cache_name(getattr(kind, "body", kind).forward) is None:
        raise InputError(
            f"{name!r} models take no keys and values of earlier tokens in transformers' form, so that questions could "
            "not be asked of a text that was read."
        )
    try:
        head_dim(config)
    except Exception as error:  # configurations whose layers differ raise when asked for one width
        raise InputError(
            f"The layers of {name!r} models differ in ways that are not supported: {first_line(error).split('. ')[0]}."
        ) from error


def _check_layers(name: str, text: Any) -> None:
    """InputError where a decoder has layers that cannot be read, or no attention."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    compared = text.model_type in RECURRENT_FAMILIES
    odd = sorted(set(kinds) - _ATTENTION - (_RECURRENT if compared else set()))
    recurrent = sorted(setting for setting in vars(text) if _RECURRENT_SETTING.search(setting))
    if "indexed_attention" in odd:
        raise InputError(
            f"{name!r} models have layers in which every row attends to the keys that an indexer chooses for it: that "
            "needs a kernel that reads keys by such lists, where transformers masks a matrix of all rows and keys."
        )
    if not getattr(text, "num_attention_heads", 0):
        raise InputError(
            f"{name!r} models like this one have no attention heads, or not in one stack of layers: there is no "
            "attention to take over."
        )
    if text.model_type == "big_bird" and text.attention_type != "original_full":
        raise InputError(
            f"{name!r} models are decoders only where attention_type is 'original_full', in transformers as well; set "
            "that in the configuration if this one was trained to generate text."
        )
    if text.model_type in _ALIBI or getattr(text, "alibi", False):
        raise InputError(
            f"{name!r} models like this one tell positions by what they add to the scores of attention (ALiBi), which "
            "attention here cannot do."
        )
    if recurrent and odd:
        raise InputError(
            f"{name!r} models have recurrent layers (setting {recurrent[0]!r}) of a kind that has not been compared "
            f"with transformers' own reading; those of {', '.join(sorted(RECURRENT_FAMILIES))} have been."
        )
    if odd:
        raise InputError(
            f"{name!r} models have layers of type {', '.join(odd)}, of a kind that has not been compared with "
            "transformers' own reading."
        )
    if (getattr(text, "num_kv_shared_layers", None) or 0) >= (getattr(text, "num_hidden_layers", None) or 1):
        raise InputError(
            f"{name!r} models attend to the keys and values of another model, whose tokens they guess; name that one."
        )
