"""Linear layers of a single row that are given the same row, one after the other: one kernel for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

Forward = Callable[[Tensor], Tensor]


def single(input: Tensor, weight: Tensor) -> bool:
    """True for one row (..., width), and weights (outputs, width) that the kernels read."""
    # Not a layer's in_features, which under tensor parallelism is the width of the whole layer.
    return input.numel() == weight.shape[1] and weight.is_contiguous() and input.dtype == weight.dtype


class SeveralLayers:
    """Layers whose products with a row are all computed when the first layer is called with it.

    The model's code calls each of them as before. One that is called with another tensor, or with one that was written
    to since, computes its own.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Of each layer the weight (outputs, width) and the bias, which all or none have; see
        :func:`apb.kernels.matvec.several`.
        """
        self._weights, self._biases = zip(*layers, strict=True)
        self._given: tuple[Tensor, int] | None = None
        self._found: list[Tensor] = []

    def forward(self, number: int) -> Forward:
        """What stands for the forward of one of the layers."""
        weight, bias = self._weights[number], self._biases[number]

        def forward(input: Tensor) -> Tensor:
            if not single(input, weight) or input.is_inference():  # which has no versions
                return functional.linear(input, weight, bias)
            if number == 0:
                self._compute(input)
            if self._given is None or self._given[0] is not input or self._given[1] != input._version:
                from ..kernels import matvec

                return matvec.linear(input, weight, bias)
            found = self._found[number]
            if number == len(self._found) - 1:
                self._given, self._found = None, []
            return found

        return forward

    def _compute(self, input: Tensor) -> None:
        from ..kernels import matvec  # needs Triton, which is there on GPUs

        self._given = input, input._version
        self._found = matvec.several(input, self._weights, self._biases)
