"""Faster layers on GPUs, around their attention: parts compiled by torch.compile, and products of single rows.

Run one operation after the other, norms, rotary embeddings and activations read and write every row several times: a
tenth of a layer's time in prefill. They are compiled one by one, so that a graph serves all layers and any number of
rows; the attention function and the cache between them stay ordinary Python. A step of decode is nearly all products of
one row, for which :mod:`apb.kernels.matvec` is faster than torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
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
    """Compile a model's norms, dense MLPs and rotary embeddings, exchange its linear layers; returns what undoes it.

    Numbers change by rounding: what is fused is not rounded to the model's dtype in between, and sums are of another
    order.
    """
    # Of that class alone: those that were quantized or adapted are others, and what others put there stays.
    linear = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for layer in linear:
        layer.__class__ = _Linear
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
        for layer in linear:
            layer.__class__ = nn.Linear
        for module in changed:
            vars(module).pop("forward", None)
        for source, original in rotations:
            _set(source, original)

    return undo


class _Linear(nn.Linear):
    """A class, not a function put into every layer: what is compiled for one layer must serve the others."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        # Not in_features: of tensor parallel's shards that is the whole's.
        alone = input.numel() == weight.shape[1] and not torch.is_grad_enabled()
        if alone and weight.is_contiguous() and type(weight.data) is Tensor and input.dtype == weight.dtype:
            from ..kernels import matvec  # Triton: there where GPUs are

            return matvec.linear(input, weight, self.bias)
        return super().forward(input)


def _set(source: ModuleType, rotate: Callable[..., Any]) -> None:
    setattr(source, _ROPE, rotate)
