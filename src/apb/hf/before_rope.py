"""q, k and v before RoPE, which trained heads score with: caught on their way through the attention module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


class BeforeRope:
    """Hooks that keep the outputs of q, k and v projections (after q_norm and k_norm where a model has them)."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._caught: dict[int, dict[str, Tensor]] = {}
        self._handles = []
        for module in modules:
            for part, source in _sources(module).items():
                self._handles.append(source.register_forward_hook(self._catch(int(module.layer_idx), part)))  # type: ignore[arg-type]

    def _catch(self, layer: int, part: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._caught.setdefault(layer, {})[part] = output

        return hook

    def pop(self, layer: int) -> Tensor:
        """(rows, (heads + 2 kv_heads) * head_dim): q, k, v of the layer side by side; forgotten afterwards."""
        caught = self._caught.pop(layer)
        return torch.cat([caught[part][0].flatten(1) for part in ("q", "k", "v")], -1)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _sources(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules whose outputs are q, k and v before RoPE. Norms of q and k stand before RoPE where they exist."""
    sources = {}
    for part, names in {"q": ("q_norm", "q_proj"), "k": ("k_norm", "k_proj"), "v": ("v_proj",)}.items():
        source = next(
            (getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None
        )
        if source is None:
            raise InputError(
                f"Trained heads need {' or '.join(names)} in the attention layer, and {type(module).__name__} has "
                "neither; use the compressor 'query-edge'."
            )
        sources[part] = source
    return sources
