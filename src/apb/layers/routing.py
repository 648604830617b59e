"""Routing of a pass: each layer gets the attention of its kind, over the rows that it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .base import AttentionInput, LayerKind

# One layer's input to its output (rows, heads, head_dim), in q's dtype.
Attend = Callable[[AttentionInput], Tensor]


class Router:
    """The attention of one pass of the model, by kind of layer."""

    def __init__(self, routes: Mapping[LayerKind, Attend]) -> None:
        self._routes = routes

    def __call__(self, layer: AttentionInput) -> Tensor:
        """Attention output (rows, heads, head_dim) of a layer."""
        return self._routes[layer.kind](layer)
