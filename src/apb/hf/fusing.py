"""Fusing what a layer does beside its matrix products and attention, with torch.compile, on GPUs.

Run one operation after the other, norms, rotary embeddings and activations read and write every row several times: a
tenth of a layer's time. They are compiled one by one, so that a graph serves all layers and any number of rows; the
attention function and the cache between them stay ordinary Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..kernels.fused import why_no_triton
from .chunking import is_dense_mlp

_ROPE = "apply_rotary_pos_emb"


def why_not(device: torch.device) -> str | None:
    """Why nothing is compiled on such a device; None where it is."""
    if device.type != "cuda":
        return f"compiling takes longer than it saves on device type {device.type}"
    return why_no_triton()


def fuse_parts(model: PreTrainedModel) -> Callable[[], None]:
    """Compile a model's norms, dense MLPs and rotary embeddings; returns what undoes it.

    Numbers change by rounding: what is fused is not rounded to the model's dtype in between.
    """
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    changed: list[nn.Module] = []
    for module in model.modules():
        kind = type(module)
        plain = kind.__module__.startswith("torch.") or "forward" in vars(module)  # fused already; somebody else's
        if (kind.__name__.endswith("Norm") or is_dense_mlp(module)) and not plain:
            compiled.setdefault(kind, torch.compile(kind.forward, dynamic=True))
            module.forward = partial(compiled[kind], module)
            changed.append(module)
    # Attention calls the rotary embedding by its name in its own file. Other models of the family that this process
    # holds meanwhile call the compiled one too, to the same effect.
    sources = {sys.modules[type(module).__module__] for module in model.modules() if hasattr(module, "layer_idx")}
    rotations = [(source, vars(source)[_ROPE]) for source in sources if _ROPE in vars(source)]
    for source, original in rotations:
        _set(source, torch.compile(original, dynamic=True))

    def undo() -> None:
        for module in changed:
            vars(module).pop("forward", None)
        for source, original in rotations:
            _set(source, original)

    return undo


def _set(source: ModuleType, rotate: Callable[..., Any]) -> None:
    setattr(source, _ROPE, rotate)
