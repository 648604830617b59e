"""Models of well-known shapes with random weights, for benchmarks, where the output does not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..errors import InputError, at_least
from .decoders import from_config
from .loading import load_config, shipped_model

_FOLDER = Path(__file__).parent / "configs"


def shapes() -> list[str]:
    """Names of the shapes shipped with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def shape_config(name: str, layers: int | None = None) -> Any:
    """The configuration of a shape, with ``layers`` layers if given; InputError for an unknown name."""
    if name not in shapes():
        raise InputError(f"Unknown model shape {name!r}; choose one of {', '.join(shapes())}.")
    values = json.loads((_FOLDER / f"{name}.json").read_text())
    if layers is not None:
        at_least("layers", layers, 1)
        values["num_hidden_layers"] = layers
    return AutoConfig.for_model(**values)


def config_of(model: str | None, shape: str | None, layers: int | None = None) -> Any:
    """The configuration of a checkpoint, or of a shape with fewer layers if asked; by default of the shipped model.

    Raise InputError if both a checkpoint and a shape are given.
    """
    if model and shape:
        raise InputError("Give a model or a shape with random weights, not both.")
    return shape_config(shape, layers) if shape else load_config(model or shipped_model())


def random_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model with transformers' random initialisation, created directly on the device."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        return from_config(config, dtype=dtype).eval()
