"""Models of well-known shapes with random weights, for benchmarks, where the output does not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..errors import DoesNotFit, InputError, at_least
from ..hardware import free_memory
from .counting import model_shape
from .decoders import from_config
from .loading import load_config, shipped_model

_FOLDER = Path(__file__).parent / "configs"


def shapes() -> list[str]:
    """Names of the shapes shipped with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def shape_config(name: str, layers: int | None = None) -> Any:
    """The configuration of a shape, with its first ``layers`` if given; InputError for an unknown name, or too many."""
    if name not in shapes():
        raise InputError(f"Unknown model shape {name!r}; choose one of {', '.join(shapes())}.")
    values = json.loads((_FOLDER / f"{name}.json").read_text())
    if layers is not None:
        at_least("layers", layers, 1)
        if layers > values["num_hidden_layers"]:
            raise InputError(f"The shape {name!r} has {values['num_hidden_layers']} layers; ask for no more.")
        values["num_hidden_layers"] = layers
    return AutoConfig.for_model(**values)


def config_of(model: str | None, shape: str | None, layers: int | None = None) -> Any:
    """The configuration of a checkpoint, or of a shape with fewer layers if asked; by default of the shipped model.

    Raise InputError if both a checkpoint and a shape are given.
    """
    if model and shape:
        raise InputError("Give a model or a shape with random weights, not both.")
    return shape_config(shape, layers) if shape else load_config(model or shipped_model())


def check_room(config: Any, dtype: torch.dtype, device: torch.device, ranks: int) -> None:
    """DoesNotFit if a process's memory cannot take the weights of a random model; ``ranks``: processes of the host."""
    needed, free = model_shape(config).parameters * dtype.itemsize, free_memory(device, ranks)
    if needed > free:
        raise DoesNotFit(
            f"The random weights take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free for a process on "
            f"{device.type}; take fewer layers (--layers), or a smaller shape."
        )


def random_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model with transformers' random initialisation, created directly on the device."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        return from_config(config, dtype=dtype).eval()
