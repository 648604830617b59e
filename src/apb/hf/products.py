"""Attention that a model's own code computes, as in GPT-J, Falcon or XGLM: from the product of queries and keys on.

While such a module runs, that product is not computed. :class:`_Scores` takes its place and notes what the code does to
it, up to the product with the values, whose place the attention function takes. Masks are left out, because the plan
says which keys a row sees; what cannot be left out is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from .forwards import replace_forwards

_PRODUCTS = ("matmul", "__matmul__", "bmm")
# As the function registered with transformers: of module, q, k and v (1, heads, rows, d), no mask, and scaling=.
Attention = Callable[..., tuple[Tensor, None]]


def follow_products(modules: Sequence[nn.Module], attention: Attention) -> Callable[[], None]:
    """Have ``attention`` compute what modules compute by matrix products; returns a function that undoes it."""
    return replace_forwards(modules, lambda module: _followed(module, attention))


def _followed(module: nn.Module, attention: Attention) -> Callable[..., Any]:
    original = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Following(module, attention):
            return original(*args, **kwargs)

    return run


class _Following(TorchFunctionMode):
    """Puts :class:`_Scores` in place of the product of queries and keys, the first of two stacks in these modules."""

    def __init__(self, module: nn.Module, attention: Attention) -> None:
        super().__init__()
        self._module, self._attention = module, attention
        self._zeros: Tensor | None = None
        self._found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self._found:  # what follows is told to the scores, and the attention function has products of its own
            return func(*args, **kwargs)
        if name in _PRODUCTS and [x.dim() > 2 for x in args] == [True, True]:
            return self._scores(*args)
        if name == "baddbmm":
            return self._added(*args, **kwargs)
        if name == "zeros" and len(args) > 2:
            # What some add scores to: of all rows and keys, it would take more memory than anything else.
            self._zeros = func((), **kwargs).expand(args)
            return self._zeros
        return func(*args, **kwargs)

    def _scores(self, q: Tensor, k: Tensor) -> _Scores:
        self._found = True
        return _Scores(self._module, self._attention, q, k.transpose(-1, -2))

    def _added(self, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> _Scores:
        return self._scores(batch1, batch2) * alpha + (None if input is self._zeros else input)


class _Scores:
    """Scores, or from the softmax on weights, of q (..., rows, d) and k (..., keys, d), as a model's code sees them."""

    def __init__(self, module: nn.Module, attention: Attention, q: Tensor, k: Tensor) -> None:
        self._module, self._attention = module, attention
        self._q, self._k = q, k
        self._scale = 1.0
        self._are_weights = False
        self.shape = torch.Size((*q.shape[:-1], k.shape[-2]))
        # They are nowhere, and neither should be what the code makes for them, as the value of a mask (GPT-Neo).
        self.dtype, self.device = q.dtype, torch.device("meta")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        every = [part for each in given for part in (each if isinstance(each, (list, tuple)) else [each])]
        scores = next(each for each in every if isinstance(each, cls))
        name = func.__name__
        if name == "where" and not scores._are_weights:  # a mask that the model made itself
            return scores
        if name in ("softmax", "dropout") and scores is args[0]:
            return getattr(scores, name)(*args[1:], **(kwargs or {}))
        if name in _PRODUCTS and scores is args[0]:
            return scores @ args[1]
        raise scores._cannot(f"applies {name} to its scores")

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: int) -> _Scores:
        """The same scores in another shape, heads apart or folded into the batch, which has one row."""
        arranged = torch.empty(self.shape, device="meta").view(shape).shape
        if arranged[-2:] != self.shape[-2:]:
            raise self._cannot(f"arranges its scores of {tuple(self.shape)} as {shape}")
        self.shape = arranged
        return self

    def to(self, dtype: torch.dtype) -> _Scores:
        """The same scores: kernels choose their precision."""
        self.dtype = dtype
        return self

    def softmax(self, dim: int, dtype: torch.dtype | None = None, **options: Any) -> _Scores:
        """The weights."""
        if dim not in (-1, len(self.shape) - 1):
            raise self._cannot(f"takes a softmax over dimension {dim}")
        self._are_weights = True
        return self.to(dtype or self.dtype)

    def dropout(self, *args: Any, **options: Any) -> _Scores:
        """The same weights: models do not train here."""
        return self

    def __mul__(self, factor: float) -> _Scores:
        if self._are_weights or not isinstance(factor, (int, float)):
            raise self._cannot("multiplies its scores by more than a number")
        self._scale *= factor
        return self

    def __truediv__(self, divisor: float) -> _Scores:
        return self * (1 / divisor)

    def __add__(self, mask: Tensor | None) -> _Scores:
        if mask is not None:
            raise self._cannot("adds to its scores, as positions are told by ALiBi or by learned distances")
        return self

    def __matmul__(self, values: Tensor) -> Tensor:
        """Attention, as the weights times values (..., keys, d)."""
        if not self._are_weights:
            raise self._cannot("takes no softmax of its scores")
        folded = values.dim() == 3  # the only row of the batch and the heads in one dimension
        q, k, v = (x.unsqueeze(0) if x.dim() == 3 else x for x in (self._q, self._k, values))
        # Some convert queries and keys to fp32 for the product, in which kernels add up anyway.
        out, _ = self._attention(self._module, q.to(v.dtype), k.to(v.dtype), v, None, scaling=self._scale)
        out = out.transpose(1, 2)
        return out[0] if folded else out

    def __getattr__(self, name: str) -> Any:
        raise self._cannot(f"uses {name} of its scores")

    def _cannot(self, what: str) -> InputError:
        return InputError(
            f"{type(self._module).__name__} {what}, which attention here cannot do: use transformers itself."
        )
