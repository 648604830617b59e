"""Layers of one rank on several GPUs, for models too large for one, by accelerate's device map.

accelerate assigns the layers to GPUs, and its hooks move the rows from one layer's GPU to the next one's; attention,
cache and collectives run on the GPU of their layer. The GPUs of a rank work one after the other.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers import PreTrainedModel

from ..errors import DoesNotFit, InputError
from .decoders import from_config


def device_map(config: Any, gpus: int, dtype: torch.dtype, memory: int | None = None) -> dict[str, int]:
    """accelerate's balanced device map for a configuration, from module names to GPUs 0 .. gpus - 1.

    Built on the meta device: no weights are allocated. ``memory``: bytes per GPU; None for no limit.

    Raises:
        InputError: the model does not declare which of its modules cannot be split.
        DoesNotFit: the weights, in ``dtype``, exceed ``memory``: nothing is offloaded to the CPU or to disk.
    """
    return balanced(without_weights(config), gpus, dtype, memory)


def without_weights(config: Any) -> PreTrainedModel:
    """The modules of a configuration's model; those of a checkpoint's own code where its configuration runs it too."""
    trusted = type(config).__module__.startswith("transformers_modules.")
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # some families choose classes by it, of which none has this package's name
    with torch.device("meta"):
        return from_config(config, trust_remote_code=trusted)


def balanced(model: PreTrainedModel, gpus: int, dtype: torch.dtype, memory: int | None = None) -> dict[str, int]:
    """:func:`device_map` for an existing model, on any device."""
    whole: Any = model._no_split_modules
    if not whole:
        raise InputError(
            f"{type(model).__name__} does not declare which of its modules must stay on one GPU: "
            "its layers cannot be split over several."
        )
    room: Any = dict.fromkeys(range(gpus), sys.maxsize if memory is None else memory)
    options: dict[str, Any] = {"no_split_module_classes": list(whole), "dtype": dtype}
    places = infer_auto_device_map(model, get_balanced_memory(model, dict(room), **options), **options)
    if not all(isinstance(place, int) for place in places.values()):
        size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        raise DoesNotFit(
            f"The weights of {type(model).__name__} take {size / 2**30:.1f} GiB and do not fit {gpus} GPUs of "
            f"{room[0] / 2**30:.1f} GiB, whole layers on each; use more GPUs per rank (--gpus-per-rank)."
        )
    # For a model smaller than its embeddings accelerate leaves the first GPUs empty: renumber from a rank's first GPU.
    used = sorted(set(places.values()))
    return {name: used.index(place) for name, place in places.items()}


def check_map(model: nn.Module) -> None:
    """Raise InputError if accelerate has offloaded some of a model's weights."""
    places = {name: str(place) for name, place in getattr(model, "hf_device_map", {}).items()}
    everywhere = set(places.values())
    away = {"disk"} if everywhere <= {"cpu", "disk"} else {"cpu", "disk"}
    offloaded = [name for name, place in places.items() if place in away]
    if offloaded:
        raise InputError(
            f"accelerate has put {offloaded[0]!r}{' and others' * (len(offloaded) > 1)} on the {places[offloaded[0]]} "
            "(hf_device_map), from where every pass would copy the weights again; use more GPUs, or a smaller model."
        )


def devices(model: PreTrainedModel) -> list[torch.device]:
    """Devices of a model's weights; the first one takes the token ids."""
    first = next(model.get_input_embeddings().parameters()).device
    return list(dict.fromkeys([first, *(parameter.device for parameter in model.parameters())]))


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's weights, which quantizers store as buffers."""
    return next(chain(module.parameters(), module.buffers())).device


def split(
    model: nn.Module, attention: Sequence[nn.Module], places: dict[str, int] | None = None
) -> tuple[tuple[int, int], ...]:
    """(layers, weights) on each device, by the map ``places`` of :func:`device_map`, or by the weights' own devices.

    ``attention``: the attention modules of the layers.
    """
    layers: Counter[Any] = Counter()
    weights: Counter[Any] = Counter()
    names = {module: name for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        weights[parameter.device if places is None else _place(name, places)] += parameter.numel()
    for module in attention:
        layers[device_of(module) if places is None else _place(names[module], places)] += 1
    return tuple((layers[place], weights[place]) for place in weights)


def _place(name: str, places: dict[str, int]) -> int:
    """Device of a parameter or module in a map, which names it or a module that contains it."""
    return next(place for part, place in places.items() if part in ("", name) or name.startswith(part + "."))
