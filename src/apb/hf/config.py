"""Facts of a model read from its configuration."""

from __future__ import annotations

from typing import Any

from .windows import windows


def kv_heads(config: Any) -> int:
    """KV heads, over all processes that share the weights."""
    text = config.get_text_config()
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def query_heads(config: Any) -> int:
    """Query heads, over all processes that share the weights."""
    return int(config.get_text_config().num_attention_heads)


def layer_count(config: Any) -> int:
    """Decoder layers of any kind."""
    return int(config.get_text_config().num_hidden_layers)


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
        kinds.append(f"{len(lengths)} of {text.num_hidden_layers} layers see {lengths[0]:,} tokens")
    if softcap(config) is not None:
        kinds.append("capped logits")
    if text.model_type == "gpt_oss":
        kinds.append("sinks")
    if getattr(text, "kv_lora_rank", None):
        kinds.append("latent attention")
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        kinds.append("experts")
    return ", ".join(kinds) or "full attention"
