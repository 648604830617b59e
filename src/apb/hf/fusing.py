"""Faster layers on GPUs, apart from attention: parts compiled by torch.compile, and matrix-vector products.

In eager mode, norms, rotary embeddings and activations read and write every row several times: a tenth of a layer's
time in prefill. They are compiled one by one, so that one graph serves all layers and any number of rows; the attention
function and the cache between them stay ordinary Python. A decode step is nearly all matrix-vector products, for which
:mod:`apb.kernels.matvec` is faster than torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..kernels.fused import why_no_triton
from .chunking import is_dense_mlp
from .one_row import single

_ROPE = "apply_rotary_pos_emb"


def why_not(device: torch.device) -> str | None:
    """Reason nothing is compiled on such a device, or None if parts are."""
    if device.type != "cuda":
        return f"compiling takes longer than it saves on device type {device.type}"
    return why_no_triton()


def fuse_parts(model: PreTrainedModel) -> Callable[[], None]:
    """Compile a model's norms, dense MLPs and RoPE, and replace its linear layers; returns a function that undoes it.

    Results change by rounding: fused operations do not round to the model's dtype in between, and sums change order.
    """
    # Exactly this class: quantized and adapted layers are subclasses, and a forward set by another library stays.
    linear = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for layer in linear:
        layer.__class__ = _Linear
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    changed: list[nn.Module] = []
    for module in model.modules():
        kind = type(module)
        plain = kind.__module__.startswith("torch.") or "forward" in vars(module)  # fused already; another library's
        # Messages inside, and functions of its own on every layer, for each of which a graph would be compiled.
        plain = plain or any(isinstance(weight, DTensor) for weight in module.parameters())
        if (kind.__name__.endswith(("Norm", "NormGated")) or is_dense_mlp(module)) and not plain:
            compiled.setdefault(kind, torch.compile(kind.forward, dynamic=True))
            module.forward = partial(compiled[kind], module)
            changed.append(module)
    attending = [module for module in model.modules() if hasattr(module, "layer_idx")]
    # Not where attention is followed step by step (see products), which what is compiled would hide.
    hidden = {type(module).__module__ for module in attending if "forward" in vars(module)}
    sources = {sys.modules[name] for name in {type(module).__module__ for module in attending} - hidden}
    rotations = [_Rotation.of(source) for source in sources if _ROPE in vars(source)]

    def undo() -> None:
        for layer in linear:
            layer.__class__ = nn.Linear
        for module in changed:
            vars(module).pop("forward", None)
        for rotation in rotations:
            rotation.release()

    return undo


class _Linear(nn.Linear):
    """A class rather than a function set on every layer, so that a graph compiled for one layer serves the others."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if single(input, weight) and type(weight.data) is Tensor and not torch.is_grad_enabled():
            from ..kernels import matvec  # needs Triton, which is there on GPUs

            return matvec.linear(input, weight, self.bias)
        return super().forward(input)


def _of_any_length(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled RoPE, one graph of which serves any number of rows.

    Rows are the second last dimension of the sines, its last tensor. With every size a variable, as ``dynamic`` makes
    them, the kernel would compute where each element is, and take seven times as long as a copy.
    """

    def rotate(*args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in args if isinstance(each, Tensor)]
        for each in tensors:
            # Second last in q and k as well, in most models.
            found = [dim for dim in (-2, *range(each.dim())) if each.shape[dim] == tensors[-1].shape[-2] > 1]
            if found:
                torch._dynamo.maybe_mark_dynamic(each, found[0] % each.dim())
        return compiled(*args, **kwargs)

    return rotate


class _Rotation:
    """The compiled RoPE of a family, as long as any of its models in this process is fused.

    Attention looks the function up by name in its own module, so all models of the family call it.
    """

    _known: ClassVar[dict[ModuleType, _Rotation]] = {}

    def __init__(self, source: ModuleType) -> None:
        self._source, self._original, self._users = source, vars(source)[_ROPE], 0
        setattr(source, _ROPE, _of_any_length(torch.compile(self._original)))

    @classmethod
    def of(cls, source: ModuleType) -> _Rotation:
        """That of a family's module; each user must :meth:`release` it once."""
        if source not in cls._known:
            cls._known[source] = cls(source)
        found = cls._known[source]
        found._users += 1
        return found

    def release(self) -> None:
        """Restore the family's own function, once no model needs the compiled one."""
        self._users -= 1
        if not self._users:
            setattr(self._source, _ROPE, self._original)
            del self._known[self._source]
