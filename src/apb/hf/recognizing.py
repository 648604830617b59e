"""What a model's own code computes, found out by calling it: so that a kernel can take its place for a few rows.

Modules are called one by one with stand-ins for their weights and parts, on the CPU, and what they return is compared
with what a kernel would. So no list of families is needed, and a module that computes something else is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.norm import RowNorm

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
# Norms compute in fp32 whatever they are given.
_CLOSE = 1e-5
# Share of numbers that may be rounded otherwise: where rows are rounded once instead of twice, it is about a third.
_FEW = 0.03


class _Standing:
    """A module with some of its attributes replaced."""

    def __init__(self, module: nn.Module, **replaced: Any) -> None:
        self._module, self._replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        replaced = self.__dict__["_replaced"]
        return replaced[name] if name in replaced else getattr(self.__dict__["_module"], name)


def row_norm(module: nn.Module) -> RowNorm | None:
    """The RMS norm that a module is; None if it is another function, or rounds otherwise in bf16."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    # The last row tells where eps is added, those before it what is done to large numbers.
    rows = _numbers(4, len(weight)) * torch.tensor([[1.0], [30.0], [1e4], [eps**0.5]])
    stand = _numbers(len(weight))
    narrow = rows.bfloat16(), stand.bfloat16()
    found, rounded = _called(module, rows, weight=stand), _called(module, narrow[0], weight=narrow[1])
    for offset, before in ((False, True), (True, False), (False, False), (True, True)):
        wanted = RowNorm(narrow[1], eps, offset, before).of(narrow[0])
        if _alike(found, RowNorm(stand, eps, offset, before).of(rows)) and _same_bits(rounded, wanted):
            return RowNorm(weight, eps, offset, before)
    return None


def gate(module: nn.Module) -> str | None:
    """The activation, of those of :func:`apb.kernels.matvec.gated`, by which an MLP gates what ``up_proj`` gives
    ``down_proj``; None if that is not all it does.
    """
    # All pairs of numbers up to where some clamp them.
    sizes = torch.tensor([0.1, 0.7, 2.9, 15.0, 300.0, 1e4], device="cpu")
    values = torch.cat([sizes, -sizes])
    opening, opened = (each.reshape(1, 1, -1) for each in torch.meshgrid(values, values, indexing="ij"))
    parts = {"gate_proj": lambda rows: opening, "up_proj": lambda rows: opened, "down_proj": lambda rows: 0.7 - rows}
    found = _called(module, opening, **parts)
    for name, function in _GATES.items():
        if _alike(found, 0.7 - function(opening) * opened):
            return name
    return None


def rotates_halves(rotate: Callable[..., Any]) -> bool:
    """True if a RoPE of q, k, cos and sin takes the halves of a head as pairs."""
    q, k, angles = _numbers(1, 3, 2, 8), _numbers(1, 2, 2, 8), _numbers(1, 2, 8)
    cos, sin = angles.cos(), angles.sin()

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    try:
        with torch.no_grad():
            found = rotate(q, k, cos, sin)
    except Exception:  # of other parameters, or other shapes
        return False
    return (
        isinstance(found, tuple)
        and len(found) == 2
        and all(_alike(x, rotated(y)) for x, y in zip(found, (q, k), strict=True))
    )


def _called(module: nn.Module, x: Tensor, **replaced: Any) -> Any:
    """What a module's code makes of x, with other attributes; None if it cannot be called so."""
    try:
        with torch.no_grad():
            return type(module).forward(_Standing(module, **replaced), x)
    except Exception:  # it needs what a stand-in does not have
        return None


def _alike(found: Any, wanted: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.is_meta:
        return False
    return torch.allclose(found.cpu().double(), wanted.double(), rtol=_CLOSE, atol=_CLOSE)


def _same_bits(found: Any, wanted: Tensor) -> bool:
    """True for the same dtype and numbers, but for a few that a sum in another order rounds otherwise."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return float((found != wanted).float().mean()) < _FEW


def _numbers(*shape: int) -> Tensor:
    """Numbers between -1 and 1, without a generator that others use."""
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(1, count + 1, dtype=torch.float32, device="cpu") ** 1.3).view(shape)
