"""Layers whose weights the processes of a rank share, run on this process's part by this package.

transformers' own wrappers of such layers swap parameters at every call, and some go through DTensor, whose dispatch
costs the host more time than a row costs a GPU. Here the same products, of the same parts, are ordinary calls: those of
a single row by the kernels of decode, with messages that CUDA graphs can capture.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from ..distributed.collectives import Group
from ..distributed.one_shot import QuickGroup
from .forwards import replace_forwards

# Names in transformers' plans of how a layer's weights are cut: outputs, which stay where they are or are gathered;
# inputs, whose products are summed; the rows of an embedding; and what changes gradients alone.
_OUTPUTS, _INPUTS, _TABLE = "colwise", "rowwise", "embedding_rowwise"
_GATHERED = ("colwise_gather_output", "colwise_rep")
_GRADIENTS = "replicated_with_grad_allreduce"

Forward = Callable[[Tensor], Tensor]


def why_not(model: PreTrainedModel, size: int) -> str | None:
    """The reason why layers shared by ``size`` processes are left to transformers; None if there are none, or else if
    :func:`run_shares` can take them over.
    """
    if size == 1:
        return None
    plan = model.tp_plan
    others = set(plan.values()) - {_OUTPUTS, _INPUTS, _TABLE, *_GATHERED, _GRADIENTS}
    if others:
        return f"weights are shared by {' and '.join(sorted(others))}"
    for name, module in model.named_modules():
        shared = [weight for weight in module.parameters(recurse=False) if isinstance(weight, DTensor)]
        if shared and (type(module) not in (nn.Linear, nn.Embedding) or _style(plan, name) is None):
            return f"{type(module).__name__} {name!r} shares weights in a way of its own"
        if any(length % size for weight in shared for length in weight.shape if weight.dim() > 1):
            return f"{name!r} does not divide evenly by {size}"
    return None


def run_shares(model: PreTrainedModel, group: Group, by_row: bool) -> Callable[[], None]:
    """Take over a model's shared layers, for passes without gradients; returns a function that undoes it.

    Args:
        model: one that has no reason not to, by :func:`why_not`.
        group: the processes that share the weights.
        by_row: use the kernel for linear layers of a single row.
    """
    plan = model.tp_plan
    names = {module: name for name, module in model.named_modules()}
    shared = [module for module in names if isinstance(getattr(module, "weight", None), DTensor)]

    def made(module: nn.Module) -> Forward:
        style = _style(plan, names[module])
        if style == _TABLE:
            return _of_table(_local(module.weight), group)
        bias = getattr(module, "bias", None)
        part = _local(module.weight), None if bias is None else _local(bias)
        if style == _INPUTS:
            return _of_inputs(*part, group, by_row)
        products = _of_outputs(*part, by_row)
        return _gathered(products, group) if style in _GATHERED else products

    return replace_forwards(shared, made)


def _style(plan: dict[str, str], name: str) -> str | None:
    """How a module's weights are cut; plans have a star for the numbers of layers."""
    return plan.get(name, plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)))


def _local(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


def _of_outputs(weight: Tensor, bias: Tensor | None, by_row: bool) -> Forward:
    """This process's outputs of a linear layer."""

    def forward(input: Tensor) -> Tensor:
        if by_row and _single(input, weight):
            from ..kernels import matvec  # needs Triton, which is there on GPUs

            return matvec.linear(input, weight, bias)
        return functional.linear(input, weight, bias)

    return forward


def _of_inputs(weight: Tensor, bias: Tensor | None, group: Group, by_row: bool) -> Forward:
    """A linear layer of which this process has some of the inputs: the sum over all processes, then the bias."""
    products = _of_outputs(weight, None, by_row)

    def forward(input: Tensor) -> Tensor:
        outputs = weight.shape[0]
        if by_row and _single(input, weight) and isinstance(group, QuickGroup):
            shot = group.one_shot
            if shot.takes(outputs, input.dtype):
                from ..kernels import matvec

                room = shot.room(outputs, input.dtype)
                matvec.linear(input, weight, None, into=room)
                total = shot.summed(room).view(*input.shape[:-1], outputs)
                return total if bias is None else total + bias
        total = group.sum(products(input))
        return total if bias is None else total + bias

    return forward


def _gathered(products: Forward, group: Group) -> Forward:
    """All outputs of a linear layer, from all processes."""

    def forward(input: Tensor) -> Tensor:
        parts = group.all_gather(products(input)).wait()
        return torch.cat(parts.unbind(0), -1)

    return forward


def _of_table(rows: Tensor, group: Group) -> Forward:
    """Embeddings, of which this process has every row of a range: zeros for the others' tokens, and the sum."""
    first = group.rank * rows.shape[0]

    def forward(input: Tensor) -> Tensor:
        places = input - first
        others = (places < 0) | (places >= rows.shape[0])
        found = functional.embedding(places.masked_fill(others, 0), rows).masked_fill(others.unsqueeze(-1), 0)
        if isinstance(group, QuickGroup) and input.numel() == 1 and group.one_shot.takes(found.numel(), found.dtype):
            return group.one_shot.sum(found)
        return group.sum(found)

    return forward


def _single(input: Tensor, weight: Tensor) -> bool:
    """True for one row, and weights that the kernel reads."""
    return input.numel() == weight.shape[1] and weight.is_contiguous() and input.dtype == weight.dtype
