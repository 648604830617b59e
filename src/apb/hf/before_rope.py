"""q, k and v before RoPE, the input of trained heads, captured by hooks in the attention module."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


class BeforeRope:
    """Hooks that keep the outputs of the q, k and v projections (after q_norm and k_norm if the model has them).

    Raises:
        InputError: an attention module without such projections.
    """

    def __init__(self, modules: Iterable[tuple[nn.Module, int]]) -> None:
        self._thread = threading.get_ident()  # passes of several threads may take turns, each with its own hooks
        self._caught: dict[int, dict[str, Tensor]] = {}
        self._handles = []
        for module, layer in modules:
            for part, source in _sources(module).items():
                self._handles.append(source.register_forward_hook(self._catch(layer, part)))

    def _catch(self, layer: int, part: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if threading.get_ident() == self._thread:
                self._caught.setdefault(layer, {})[part] = output

        return hook

    def pop(self, layer: int) -> Tensor:
        """q, k and v of the layer, concatenated: (rows, (heads + 2 kv_heads) * head_dim); released afterwards."""
        caught = self._caught.pop(layer)
        return torch.cat([caught[part][0].flatten(1) for part in ("q", "k", "v")], -1)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _sources(module: nn.Module) -> dict[str, nn.Module]:
    """Submodules whose outputs are q, k and v before RoPE; norms of q and k, where they exist, precede RoPE."""
    sources = {}
    for part, names in {"q": ("q_norm", "q_proj"), "k": ("k_norm", "k_proj"), "v": ("v_proj",)}.items():
        source = next(
            (getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None
        )
        if source is None:
            raise InputError(
                f"Trained heads need {' or '.join(names)} in the attention layer, but {type(module).__name__} has "
                "none; use the compressor 'query-edge'."
            )
        sources[part] = source
    return sources
