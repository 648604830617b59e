"""Facts of a model read from its configuration."""

from __future__ import annotations

from typing import Any


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
    """Token ids that the model knows."""
    return int(config.get_text_config().vocab_size)


def tied_embeddings(config: Any) -> bool:
    """True if the output head's weights are those of the embedding table."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
