"""Linear layers of a single row: those that are given the same row are one kernel, and so is an MLP's gate with what
it opens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .chunking import is_dense_mlp
from .recognizing import gate

Forward = Callable[[Tensor], Tensor]
# A layer's weight and bias.
Part = Callable[[nn.Module], tuple[Tensor, Tensor | None]]

# Names of layers that are given the same rows, in the order in which attention calls them, and of an MLP's two.
_ALIKE = ("q_proj", "k_proj", "v_proj")
_GATE = ("gate_proj", "up_proj")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def single(input: Tensor, weight: Tensor) -> bool:
    """True for one row (..., width) without gradients, and weights (outputs, width) that the kernels read."""
    # Not a layer's in_features, which under tensor parallelism is the width of the whole layer.
    one = input.numel() == weight.shape[1] and weight.is_contiguous() and input.dtype == weight.dtype
    return one and input.dtype in _DTYPES and not torch.is_grad_enabled()


def given_alike(model: nn.Module, layers: Collection[nn.Module], part: Part) -> list[list[nn.Module]]:
    """Of some layers of a model those that attention gives the same rows, one after the other, and that one kernel can
    read.
    """
    found = []
    for module in model.modules():
        together = [layer for name, layer in module.named_children() if name in _ALIKE and layer in layers]
        parts = [part(layer) for layer in together]
        alike = len({(weight.shape[1], weight.dtype, bias is None) for weight, bias in parts}) == 1
        if len(together) == len(_ALIKE) and alike and all(weight.is_contiguous() for weight, _ in parts):
            found.append(together)
    return found


def gated_mlps(model: nn.Module, layers: Collection[nn.Module], part: Part) -> dict[nn.Module, str]:
    """MLPs of three of some layers that do nothing but gate, and their activations."""
    found = {}
    for module in model.modules():
        pair = [getattr(module, name, None) for name in (*_GATE, "down_proj")]
        if not is_dense_mlp(module) or not all(layer in layers for layer in pair):
            continue
        plain = [part(layer) for layer in pair[:2] if layer is not None]
        if all(bias is None and weight.is_contiguous() for weight, bias in plain):
            activation = gate(module)
            if activation is not None:
                found[module] = activation
    return found


def of_mlp(module: Any, inner: Callable[..., Any], activation: str, part: Part) -> Callable[..., Any]:
    """What stands for the forward of an MLP of :func:`gated_mlps`; ``inner`` is that of several rows."""
    down = module.down_proj
    gates = [getattr(module, name) for name in _GATE]

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        opening, opened = (part(layer)[0] for layer in gates)
        if args or kwargs or not single(hidden, opening):
            return inner(hidden, *args, **kwargs)
        from ..kernels import matvec  # needs Triton, which is there on GPUs

        return down(matvec.gated(hidden, opening, opened, activation))

    return forward


class SeveralLayers:
    """Layers whose products with a row are all computed when the first layer is called with it.

    The model's code calls each of them as before. One that is called with another tensor, or with one that was written
    to since, computes its own.
    """

    def __init__(self, layers: Sequence[nn.Module], part: Part) -> None:
        """
        Args:
            layers: linear layers.
            part: of each the weight (outputs, width) and the bias, which all or none have; see
                :func:`apb.kernels.matvec.several`.
        """
        self._layers, self._part = layers, part
        self._given: tuple[Tensor, int] | None = None
        self._found: list[Tensor] = []

    def forward(self, number: int) -> Forward:
        """What stands for the forward of one of the layers."""
        layer, part = self._layers[number], self._part

        def forward(input: Tensor) -> Tensor:
            weight, bias = part(layer)
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

        weights, biases = zip(*(self._part(layer) for layer in self._layers), strict=True)
        self._given = input, input._version
        self._found = matvec.several(input, weights, biases)
