"""Llama 4's factor on the queries of layers without RoPE, which grows with the position.

Its code counts the rows of a pass for their positions. Here they are not in that order, so the factor is left out there
and applied by the true positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def without_own(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """Have attention modules leave their factor to :func:`warmed`; returns a function that undoes it."""
    changed = [module for module in modules if has_own(module)]
    for module in changed:
        module.attn_temperature_tuning = False  # type: ignore[assignment]

    def undo() -> None:
        for module in changed:
            module.attn_temperature_tuning = True  # type: ignore[assignment]

    return undo


def has_own(module: nn.Module) -> bool:
    """True if an attention module scales its queries by position."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not module.use_rope


def warmed(module: nn.Module, q: Tensor, positions: Tensor) -> Tensor:
    """Queries (1, heads, rows, d) at ``positions`` (1, rows) times the factor of their position."""
    floor, scale = float(module.floor_scale), float(module.attn_scale)  # type: ignore[arg-type]
    factor = 1 + torch.log1p(((positions.float() + 1) / floor).floor()) * scale
    return (q * factor[:, None, :, None].to(q.device)).to(q.dtype)
