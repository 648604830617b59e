"""Files of retaining heads: safetensors or torch (weights only), in the layout of the public APB heads."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..compressors import Head
from ..errors import InputError, first_line

_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.fc([12])\.weight$")


def load_heads(
    path: str | Path,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Head]:
    """One :class:`Head` a layer from keys ``...layers.{i}.self_attn.fc1.weight`` and ``fc2.weight``; others ignored.

    fc1 is (hidden, (heads + 2 kv_heads) * head_dim) for any hidden size, fc2 (kv_heads, hidden). Raises InputError with
    the layer and the expected shape where the file does not fit the model.
    """
    found: dict[tuple[int, int], Tensor] = {}
    for key, value in _read(Path(path)).items():
        match = _KEY.search(key)
        if match:
            found[int(match[1]), int(match[2])] = value
    features = (heads + 2 * kv_heads) * head_dim
    result = []
    for layer in range(layers):
        fc1, fc2 = found.get((layer, 1)), found.get((layer, 2))
        if fc1 is None or fc2 is None:
            raise InputError(
                f"The heads file {path} has no fc1 and fc2 for layer {layer}; the model needs them for {layers} layers."
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
        result.append(Head(fc1.to(device, dtype), fc2.to(device, dtype)))
    return result


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"The heads file {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of both formats raise whatever the bytes lead them to
        raise InputError(
            f"The heads file {path} cannot be read as safetensors or torch weights: {first_line(error)}."
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"The heads file {path} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
