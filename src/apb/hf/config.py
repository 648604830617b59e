"""Facts of a model read from its configuration."""

from __future__ import annotations

from typing import Any

from .windows import chunked, layer_count, layer_windows, windows


def of_layer(config: Any, layer: int | None = None) -> Any:
    """A decoder's settings in a layer; by default in the last of those that see all, where layers differ (Gemma 4)."""
    text = config.get_text_config()
    if not getattr(text, "is_heterogeneous", False):
        return text
    if layer is None:
        kinds = list(getattr(text, "layer_types", None) or ())
        far = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        layer = far[-1] if far else layer_count(text) - 1
    return text.per_layer_config[layer]


def kv_heads(config: Any, layer: int | None = None) -> int:
    """KV heads of a layer, over all processes that share the weights; see :func:`of_layer`."""
    settings = of_layer(config, layer)
    if getattr(settings, "multi_query", False) and not getattr(settings, "new_decoder_architecture", False):
        return 1  # Falcon's newer architecture keeps a copy for every query head
    own = None if hasattr(settings, "decoder_attention_heads") else getattr(settings, "num_key_value_heads", None)
    # MiMo V2's code has twice as many where a layer has a window, and no setting that says so.
    twice = settings.model_type == "mimo_v2_flash" and layer is not None and layer_windows(settings)[layer] is not None
    return int(own or _heads(settings)) * (2 if twice else 1)


def head_dim(config: Any, layer: int | None = None) -> int:
    """Head dim of queries and keys of a layer; see :func:`of_layer`."""
    settings = of_layer(config, layer)
    if getattr(settings, "kv_lora_rank", None):
        return int(settings.qk_nope_head_dim + settings.qk_rope_head_dim)
    return getattr(settings, "head_dim", None) or settings.hidden_size // _heads(settings)


def value_dim(config: Any, layer: int | None = None) -> int:
    """Head dim of values of a layer without latents; see :func:`of_layer`."""
    return getattr(of_layer(config, layer), "v_head_dim", None) or head_dim(config, layer)


def expands(config: Any) -> bool:
    """True if every pass expands what the cache holds into keys and values: latents, or heads that repeat (JetMoE)."""
    text = config.get_text_config()
    return bool(getattr(text, "kv_lora_rank", None)) or text.model_type == "jetmoe"


def shared_layers(config: Any) -> list[int | None]:
    """For every layer the index of that whose keys and values it attends to; None if it has its own.

    The last layers of Gemma 3n and 4 attend to those of the last layer of their type that has some.
    """
    text = config.get_text_config()
    first = layer_count(config) - (getattr(text, "num_kv_shared_layers", None) or 0)
    kinds = getattr(text, "layer_types", None) or [None] * layer_count(config)
    return [None if index < first else _last(kinds[:first], kind) for index, kind in enumerate(kinds)]


def _last(kinds: Any, kind: Any) -> int:
    return max(index for index, other in enumerate(kinds) if other == kind)


def query_heads(config: Any) -> int:
    """Query heads, over all processes that share the weights."""
    return _heads(of_layer(config))


def _heads(settings: Any) -> int:
    """Query heads; BART's family has an encoder's settings as well, and the general names mean that."""
    return int(getattr(settings, "decoder_attention_heads", None) or settings.num_attention_heads)


def softcap(config: Any) -> float | None:
    """The cap of attention logits; None without one."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def vocabulary(config: Any) -> int:
    """Size of the vocabulary."""
    return int(config.get_text_config().vocab_size)


def tied_embeddings(config: Any) -> bool:
    """True if the output head's weights are those of the embedding table."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def layers_in_words(config: Any) -> str:
    """The kinds of layers of a model, in a few words."""
    text = config.get_text_config()
    lengths = windows(text)
    kinds = []
    if lengths:
        seen = f"chunks of {lengths[0]:,} tokens" if chunked(text) else f"{lengths[0]:,} tokens"
        kinds.append(f"{len(lengths)} of {layer_count(text)} layers see {seen}")
    if softcap(config) is not None:
        kinds.append("capped logits")
    if text.model_type == "gpt_oss":
        kinds.append("sinks")
    sharing = sum(layer is not None for layer in shared_layers(config))
    if sharing:
        kinds.append(f"{sharing} share keys and values")
    if getattr(text, "kv_lora_rank", None):
        kinds.append("latent attention")
    if any(
        getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts", "ffn_config")
    ):
        kinds.append("experts")
    return ", ".join(kinds) or "full attention"
