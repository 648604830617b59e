"""Faster layers on GPUs, apart from attention: parts compiled by torch.compile, and kernels for few rows.

In eager mode, norms, rotary embeddings and activations read and write every row several times: a tenth of a layer's
time in prefill. They are compiled one by one, so that one graph serves all layers and any number of rows; the attention
function and the cache between them stay ordinary Python. A decode step is nearly all matrix-vector products, for which
:mod:`apb.kernels.matvec` is faster than torch; what lies between them is one launch each, as a call of what
torch.compile made takes the host longer than the GPU needs for a layer.
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
from ..kernels.norm import RowNorm
from .chunking import is_dense_mlp
from .forwards import replace_forwards
from .one_row import SeveralLayers, gated_mlps, given_alike, of_mlp, single
from .recognizing import rotates_halves, row_norm
from .stream import Stream, Summand, plain

_ROPE = "apply_rotary_pos_emb"
# Rows that kernels with a program for each, or for each of its heads, take.
_FEW = 64


def why_not(device: torch.device) -> str | None:
    """Reason nothing is compiled on such a device, or None if parts are."""
    if device.type != "cuda":
        return f"compiling takes longer than it saves on device type {device.type}"
    return why_no_triton()


def fuse_parts(model: PreTrainedModel, stream: Stream) -> Callable[[], None]:
    """Compile a model's norms, dense MLPs and RoPE, and replace its linear layers; returns a function that undoes it.

    Results change by rounding: fused operations do not round to the model's dtype in between, and sums change order.

    Args:
        model: on one or several GPUs.
        stream: of the model's single rows.
    """
    # Exactly this class: quantized and adapted layers are subclasses, and a forward set by another library stays.
    linear = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    # Not where processes share them, see shares: these have forwards already.
    products = {layer for layer in linear if type(layer.weight.data) is Tensor}
    undo = [_fuse_norms(model, stream), _fuse_mlps(model, products)]
    for layer in linear:
        layer.__class__ = _Linear
        if layer in products:
            layer.summand = _summand(layer, stream)  # type: ignore[assignment]
    for together in given_alike(model, products, _part):
        several = SeveralLayers(together, _part)
        forwards = {layer: several.forward(number) for number, layer in enumerate(together)}
        undo.append(replace_forwards(together, forwards.__getitem__))
    attending = [module for module in model.modules() if hasattr(module, "layer_idx")]
    # Not where attention is followed step by step (see products), which what is compiled would hide.
    hidden = {type(module).__module__ for module in attending if "forward" in vars(module)}
    sources = {sys.modules[name] for name in {type(module).__module__ for module in attending} - hidden}
    devices = {weight.device.type for weight in model.parameters()}
    rotations = [_Rotation.of(source, devices) for source in sources if _ROPE in vars(source)]

    def undo_all() -> None:
        for each in reversed(undo):
            each()
        for layer in linear:
            layer.__class__ = nn.Linear
            vars(layer).pop("summand", None)
        for rotation in rotations:
            rotation.release()

    return undo_all


def _part(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias


def _summand(layer: nn.Linear, stream: Stream) -> Summand:
    """A layer's products with single rows."""

    def product(row: Tensor) -> Tensor:
        from ..kernels import matvec  # needs Triton, which is there on GPUs

        return matvec.linear(row, *_part(layer))

    def onto(row: Tensor, residual: Tensor, norm: RowNorm | None) -> tuple[Tensor, Tensor | None]:
        from ..kernels import matvec

        return matvec.linear(row, *_part(layer), residual=residual), None

    return Summand(stream, layer.weight.shape[0], product, onto)


def _fuse_norms(model: nn.Module, stream: Stream) -> Callable[[], None]:
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}

    def made(module: nn.Module) -> Callable[..., Any]:
        kind = type(module)
        many = compiled.setdefault(kind, torch.compile(kind.forward, dynamic=True))
        norm = row_norm(module)
        return partial(_on_plain, many, module) if norm is None else _Norm(module, norm, many, stream)

    norms = [module for module in model.modules() if type(module).__name__.endswith(("Norm", "NormGated"))]
    return replace_forwards([module for module in norms if _untouched(module)], made)


def _fuse_mlps(model: nn.Module, products: set[nn.Linear]) -> Callable[[], None]:
    """Compiled for several rows; of a single one an MLP's layers are kernels, and its gate with what it opens another,
    if it does nothing else.
    """
    mlps = [module for module in model.modules() if is_dense_mlp(module) and _untouched(module)]
    gated = gated_mlps(model, products, _part)
    compiled = {kind: torch.compile(kind.forward, dynamic=True) for kind in {type(module) for module in mlps}}

    def made(module: nn.Module) -> Callable[..., Any]:
        inner = partial(_unless_single, compiled[type(module)], module)
        return of_mlp(module, inner, gated[module], _part) if module in gated else inner

    return replace_forwards(mlps, made)


def _unless_single(compiled: Callable[..., Any], module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A compiled MLP, of a single row as its code is written."""
    one = x.numel() == x.shape[-1] and not torch.is_grad_enabled()
    return (type(module).forward if one else compiled)(module, x, *args, **kwargs)


def _untouched(module: nn.Module) -> bool:
    """True if a module's code is a model's own and has no messages inside, on every layer with functions of its own,
    for each of which a graph would be compiled.
    """
    if type(module).__module__.startswith("torch.") or "forward" in vars(module):  # fused already; another library's
        return False
    return not any(isinstance(weight, DTensor) for weight in module.parameters())


def _on_plain(compiled: Callable[..., Any], module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compilers do not know of what acts as a product; see :mod:`apb.hf.stream`."""
    return compiled(module, plain(x), *args, **kwargs)


class _Norm:
    """An RMS norm: of few rows by a kernel, of a single row of the residual stream as far as it is known already."""

    def __init__(self, module: Any, norm: RowNorm, many: Callable[..., Tensor], stream: Stream) -> None:
        self._module, self._norm, self._many, self._stream = module, norm, many, stream

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, weight = plain(x), self._module.weight
        if args or kwargs:  # it was called without any to see what it is
            return self._many(self._module, x, *args, **kwargs)
        few = x.dim() in (3, 4) and x.shape[1] <= _FEW  # (1, rows, width), or (1, rows, heads, width)
        if not few or x.dtype != weight.dtype or not x.is_contiguous() or torch.is_grad_enabled():
            return self._many(self._module, x)
        if weight is not self._norm.weight:  # the model's owner gave it another
            self._norm = self._norm._replace(weight=weight)
        if x.dim() == 3 and x.numel() == len(weight) and not x.is_inference():
            return self._stream.normed(x, self._norm, _row_normed)
        return _row_normed(x, self._norm)


def _row_normed(x: Tensor, norm: RowNorm) -> Tensor:
    from ..kernels import few_rows  # needs Triton

    return few_rows.rms_norm(x, norm)


class _Linear(nn.Linear):
    """A class rather than a function set on every layer, so that a graph compiled for one layer serves the others."""

    summand: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if single(input, weight) and type(weight.data) is Tensor:
            return self.summand(input)
        return super().forward(input)


def _of_any_length(original: Callable[..., Any], devices: set[str]) -> Callable[..., Any]:
    """A compiled RoPE, one graph of which serves any number of rows; of few rows by a kernel, where halves are pairs.

    On other devices than of the types ``devices`` it is the original. Rows are the second last dimension of the sines,
    its last tensor. With every size a variable, as ``dynamic`` makes them, the kernel would compute where each element
    is, and take seven times as long as a copy.
    """
    compiled = torch.compile(original)
    by_halves = rotates_halves(original)

    def rotate(*args: Any, **kwargs: Any) -> Any:
        if by_halves and not kwargs and len(args) == 4 and args[0].device.type in devices and _few(*args):
            from ..kernels import few_rows  # needs Triton

            return few_rows.rotate_halves(*args)
        tensors = [each for each in args if isinstance(each, Tensor)]
        if not {each.device.type for each in tensors} <= devices:
            return original(*args, **kwargs)
        for each in tensors:
            # Second last in q and k as well, in most models.
            found = [dim for dim in (-2, *range(each.dim())) if each.shape[dim] == tensors[-1].shape[-2] > 1]
            if found:
                torch._dynamo.maybe_mark_dynamic(each, found[0] % each.dim())
        return compiled(*args, **kwargs)

    return rotate


def _few(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """True for few rows as :func:`apb.kernels.few_rows.rotate_halves` takes them."""
    rows, width = q.shape[-2:]
    fits = q.dim() == 4 and len(q) == 1 and cos.shape == (1, rows, width) and k.shape[-2:] == q.shape[-2:]
    fits = fits and q.dtype == k.dtype == cos.dtype
    near = q.stride(3) == k.stride(3) == 1 and cos.is_contiguous() and sin.is_contiguous()
    return fits and near and rows <= _FEW and not torch.is_grad_enabled()


class _Rotation:
    """The compiled RoPE of a family, as long as any of its models in this process is fused.

    Attention looks the function up by name in its own module, so all models of the family call it.
    """

    _known: ClassVar[dict[ModuleType, _Rotation]] = {}

    def __init__(self, source: ModuleType) -> None:
        self._source, self._original, self._users = source, vars(source)[_ROPE], 0
        self._devices: set[str] = set()
        setattr(source, _ROPE, _of_any_length(self._original, self._devices))

    @classmethod
    def of(cls, source: ModuleType, devices: set[str]) -> _Rotation:
        """That of a family's module, for a model on devices of such types; each user must :meth:`release` it once."""
        if source not in cls._known:
            cls._known[source] = cls(source)
        found = cls._known[source]
        found._users += 1
        found._devices |= devices
        return found

    def release(self) -> None:
        """Restore the family's own function, once no model needs the compiled one."""
        self._users -= 1
        if not self._users:
            setattr(self._source, _ROPE, self._original)
            del self._known[self._source]
