"""The residual stream of a single row: sums and norms that are part of the kernels before them.

Between two products a layer adds one to the row that it began with, and norms the sum. Each is a launch of its own, for
some kilobytes, which takes as long as reading megabytes of weights. So a layer whose product was seen to be added to
the row that was normed last gives the sum at once; and a message between processes, the norm of the sum as well, by the
norm that was seen to follow. Models' own code is called as ever: whatever else it does with such a product, it gets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.norm import RowNorm

# The product of a row with a layer, added to the row; and the sum normed, where the kernel does so.
Onto = Callable[[Tensor, Tensor, RowNorm | None], tuple[Tensor, Tensor | None]]
# Of tensors' functions: those that add two, and those that tell of one what is alike for the product and the sum.
_ADDING = ("add", "__add__", "__radd__")
_TELLING = ("__get__", "size", "dim", "numel")


class _Row(threading.local):
    """What this thread's pass knows: passes of several threads are interleaved.

    Attributes:
        row: the row that was normed last.
        total: the last sum, and the layer whose product it has.
        ahead: a sum that was normed already, its version, the norm, and the result.
    """

    row: Tensor | None = None
    total: tuple[Tensor, Summand] | None = None
    ahead: tuple[Tensor, int, RowNorm, Tensor] | None = None


class Stream:
    """The residual stream of single rows of one model."""

    def __init__(self) -> None:
        self.now = _Row()

    def normed(self, x: Tensor, norm: RowNorm, compute: Callable[[Tensor, RowNorm], Tensor]) -> Tensor:
        """``x`` (..., width), a row, by a norm: what is known already, or what ``compute`` gives."""
        now = self.now
        if now.total is not None and now.total[0] is x:
            now.total[1].follower = norm
        ahead, now.total, now.ahead, now.row = now.ahead, None, None, x
        if ahead is not None and ahead[0] is x and ahead[1] == x._version and ahead[2] is norm:
            return ahead[3]
        return compute(x, norm)


class Summand:
    """A linear layer of single rows whose product may be added to the residual stream.

    What is seen decides, under tensor parallelism, which message is sent: processes that share weights read the same
    rows in the same order, and so see the same.

    Attributes:
        follower: the norm of the sum, once it was seen.
    """

    def __init__(self, stream: Stream, outputs: int, product: Callable[[Tensor], Tensor], onto: Onto) -> None:
        """
        Args:
            stream: of the model.
            outputs: width of the product.
            product: the layer's function of a row.
            onto: see :data:`Onto`.
        """
        self.follower: RowNorm | None = None
        self._stream, self._outputs, self._product, self._onto = stream, outputs, product, onto
        # None until it was seen; False for good, once something else was done with a product.
        self._added: bool | None = None

    def __call__(self, input: Tensor) -> Tensor:
        """The product with a row (..., width), or what acts as it."""
        row = self._stream.now.row
        if self._added is False or row is None or not self._fits(row, input):
            return self._product(input)
        if self._added is None:
            return _Product.of(self, input, row, self._product(input), None, is_total=False)
        total, normed = self._onto(input, row, self.follower)
        ahead = None if normed is None or self.follower is None else (self.follower, normed)
        return _Product.of(self, input, row, total, ahead, is_total=True)

    def _fits(self, row: Tensor, input: Tensor) -> bool:
        alike = row.shape == (*input.shape[:-1], self._outputs) and row.dtype == input.dtype
        # Tensors of inference mode have no versions.
        return alike and row.is_contiguous() and not (row.is_inference() or input.is_inference())

    def added(self, product: _Product, other: Any) -> Tensor | None:
        """The sum of a product and ``other``; None if that is not the row, or was written to since."""
        if self._added is False or other is not product.row or other._version != product.versions[0]:
            return None
        self._added = True
        total = product.held if product.is_total else other + product.held
        now = self._stream.now
        now.total = total, self
        if product.ahead is not None:
            now.ahead = total, total._version, *product.ahead
        return total

    def plain(self, product: _Product) -> Tensor:
        """The product itself, for code that does something else with it than to add it to the row."""
        self._added = False
        if product.is_total:
            assert product.input._version == product.versions[1], "what a layer was given was written to since"
            product.held, product.is_total = self._product(product.input), False
        return product.held


class _Product(Tensor):
    """Acts as a product; it may hold the sum that the model's code is expected to ask for.

    Attributes:
        summand, input: the layer, and what it was given.
        row: what the product may be added to.
        versions: of the row and of the input.
        held: the product, or with ``is_total`` its sum with the row.
        ahead: a norm of that sum, and the result.
    """

    summand: Summand
    input: Tensor
    row: Tensor
    versions: tuple[int, int]
    held: Tensor
    ahead: tuple[RowNorm, Tensor] | None
    is_total: bool

    @classmethod
    def of(
        cls,
        summand: Summand,
        input: Tensor,
        row: Tensor,
        held: Tensor,
        ahead: tuple[RowNorm, Tensor] | None,
        *,
        is_total: bool,
    ) -> _Product:
        """One of ``input`` and a layer, which may be added to ``row``."""
        made = held.as_subclass(cls)
        made.summand, made.input, made.row, made.versions = summand, input, row, (row._version, input._version)
        made.held, made.ahead, made.is_total = held, ahead, is_total
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            if name in _ADDING and len(args) == 2 and not kwargs:
                product, other = args if isinstance(args[0], cls) else args[::-1]
                total = product.summand.added(product, other)
                if total is not None:
                    return total
            if name == "dropout" and (kwargs or {}).get("training") is False:  # which does nothing
                return args[0]
            if name in _TELLING:
                told = func(*args, **(kwargs or {}))
                if not isinstance(told, Tensor):
                    return told
            return func(*plain(args), **plain(kwargs or {}))


def plain(given: Any) -> Any:
    """Arguments with the products themselves in place of what acts as them."""
    if isinstance(given, _Product):
        return given.summand.plain(given)
    if type(given) in (list, tuple):  # no shapes, which are tuples of their own
        return type(given)(plain(each) for each in given)
    if isinstance(given, dict):
        return {name: plain(each) for name, each in given.items()}
    return given
