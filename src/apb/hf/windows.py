"""Sliding windows: which layer sees how far, as the configuration says it."""

from __future__ import annotations

from typing import Any

# Families whose layers leave the window to the mask, which is not built here; all others hand it to their attention.
_IN_MASK_ALONE = ("phimoe", "qwen2_moe")


def layer_windows(text: Any) -> list[int | None]:
    """For every layer of a decoder's configuration how many tokens it sees, its own included; None where all."""
    window = getattr(text, "sliding_window", None) or None
    types = getattr(text, "layer_types", None)
    count = text.num_hidden_layers
    if not getattr(text, "use_sliding_window", True):
        window = None
    return [window if kind == "sliding_attention" else None for kind in types] if types else [window] * count


def not_handed_over(text: Any) -> list[int | None]:
    """As :func:`layer_windows`, where layers do not tell their attention; None for each that does."""
    return layer_windows(text) if text.model_type in _IN_MASK_ALONE else [None] * text.num_hidden_layers
