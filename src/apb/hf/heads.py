"""Files of retaining heads: safetensors or torch (weights only), in the layout of the public APB heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..compressors import Head
from ..errors import InputError, first_line
from .config import head_dim, kv_heads, query_heads
from .windows import layer_count

_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.fc([12])\.weight$")


@dataclass(frozen=True)
class HeadShape:
    """The model sizes that the shapes of retaining heads depend on."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> HeadShape:
        """The sizes in a model's configuration."""
        return cls(layer_count(config), query_heads(config), kv_heads(config), head_dim(config))

    @property
    def features(self) -> int:
        """Width of a token's [q; k; v]."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def load_heads(
    path: str | Path,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    devices: Sequence[torch.device] | None = None,
) -> list[Head]:
    """Read one :class:`Head` per layer from keys ``...layers.{i}.self_attn.fc1.weight`` and ``...fc2.weight``.

    fc1 is (hidden, (heads + 2 kv_heads) * head_dim) for any hidden size, fc2 (kv_heads, hidden); other keys are
    ignored. ``devices``: one per layer; the CPU if None.

    Raises:
        InputError: the file cannot be read, or a layer's tensors are missing or do not fit the model; names the layer
            and the expected shape.
    """
    found = _read(Path(path))
    features = (heads + 2 * kv_heads) * head_dim
    result = []
    for layer in range(layers):
        fc1, fc2 = found.get((layer, 1)), found.get((layer, 2))
        if fc1 is None or fc2 is None:
            raise InputError(
                f"The heads file {path} lacks fc1 or fc2 for layer {layer}; the model needs both for {layers} layers."
            )
        if fc1.dim() != 2 or fc1.shape[1] != features:
            raise InputError(
                f"Layer {layer}: fc1 in {path} has shape {tuple(fc1.shape)}; this model needs (hidden, {features})."
            )
        if fc2.shape != (kv_heads, fc1.shape[0]):
            raise InputError(
                f"Layer {layer}: fc2 in {path} has shape {tuple(fc2.shape)}; "
                f"this model needs ({kv_heads}, {fc1.shape[0]})."
            )
        device = devices[layer] if devices else "cpu"
        result.append(Head(fc1.to(device, dtype), fc2.to(device, dtype)))
    return result


def save_heads(path: str | Path, heads: Sequence[Head]) -> None:
    """Write heads as safetensors under the keys that :func:`load_heads` reads, replacing an old file atomically."""
    tensors = {
        f"model.layers.{layer}.self_attn.{name}.weight": weight.detach().cpu().contiguous()
        for layer, head in enumerate(heads)
        for name, weight in (("fc1", head.fc1), ("fc2", head.fc2))
    }
    part = Path(path).with_name(Path(path).name + ".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(path)


def _read(path: Path) -> dict[tuple[int, int], Tensor]:
    """Tensors of the heads by (layer, 1 or 2); other tensors of a safetensors file are not read."""
    if not path.is_file():
        raise InputError(f"The heads file {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                loaded: Any = {key: file.get_tensor(key) for key in file.keys() if _KEY.search(key)}  # noqa: SIM118
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers may raise anything on malformed bytes
        # torch's own message advises loading the file without weights_only, which runs code from it.
        reason = first_line(error) if path.suffix == ".safetensors" else "it holds more, or less, than tensors"
        raise InputError(f"The heads file {path} cannot be read as safetensors or torch weights: {reason}.") from error
    if not isinstance(loaded, dict):
        raise InputError(f"The heads file {path} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    found = {}
    for key, value in loaded.items():
        match = _KEY.search(str(key))
        if match and isinstance(value, Tensor):
            found[int(match[1]), int(match[2])] = value
    return found
