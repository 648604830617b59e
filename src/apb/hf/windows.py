"""Windows of the layers, sliding or chunked, by the configuration."""

from __future__ import annotations

from typing import Any

# Families whose layers leave the window to the mask, which is not built here; all others pass it to their attention.
_IN_MASK_ALONE = ("gpt_neo", "phimoe", "qwen2_moe")
_CHUNKED = "chunked_attention"


def layer_count(config: Any) -> int:
    """Decoder layers of any kind."""
    text = config.get_text_config()
    # Where there is an encoder's number as well, as in BART's family, the general name means that.
    return int(getattr(text, "decoder_layers", None) or text.num_hidden_layers)


def layer_windows(text: Any) -> list[int | None]:
    """For every layer of a decoder's configuration its window in tokens, own token included; None if it sees all."""
    window = getattr(text, "sliding_window", None) or None
    types = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None)  # GPT-Neo's
    if not getattr(text, "use_sliding_window", True):
        window = None
    by_kind = {
        "sliding_attention": window,
        "local": getattr(text, "window_size", None),
        _CHUNKED: getattr(text, "attention_chunk_size", None),
    }
    return [by_kind.get(kind) for kind in types] if types else [window] * layer_count(text)


def windows(text: Any) -> list[int]:
    """Window lengths, in tokens, of the layers with a window."""
    return [window for window in layer_windows(text) if window is not None]


def chunked(text: Any) -> bool:
    """True if windows do not slide: their edges stand still at multiples of the window (Llama 4)."""
    return _CHUNKED in (getattr(text, "layer_types", None) or ())


def not_handed_over(text: Any) -> list[int | None]:
    """As :func:`layer_windows`, for layers that do not pass the window to their attention; None for all others."""
    by_mask = text.model_type in _IN_MASK_ALONE or chunked(text)
    return layer_windows(text) if by_mask else [None] * layer_count(text)
