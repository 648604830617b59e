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
from ..kernels.norm import RowNorm
from .forwards import replace_forwards
from .one_row import Forward, SeveralLayers, gated_mlps, given_alike, of_mlp, single
from .stream import Stream, Summand

# Names in transformers' plans of how a layer's weights are cut: outputs, which stay where they are or are gathered;
# inputs, whose products are summed; the rows of an embedding; and what changes gradients alone.
_OUTPUTS, _INPUTS, _TABLE = "colwise", "rowwise", "embedding_rowwise"
_GATHERED = ("colwise_gather_output", "colwise_rep")
_GRADIENTS = "replicated_with_grad_allreduce"


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


def run_shares(model: PreTrainedModel, group: Group, stream: Stream | None) -> Callable[[], None]:
    """Take over a model's shared layers, for passes without gradients; returns a function that undoes it.

    Args:
        model: one that has no reason not to, by :func:`why_not`.
        group: the processes that share the weights.
        stream: that of the model's single rows, whose linear layers are kernels then; None for ordinary layers.
    """
    plan, by_row = model.tp_plan, stream is not None
    names = {module: name for name, module in model.named_modules()}
    shared = [module for module in names if isinstance(getattr(module, "weight", None), DTensor)]
    products: dict[nn.Module, Forward] = {
        module: _of_outputs(*_part(module), by_row) for module in shared if type(module) is nn.Linear
    }
    # Made once: taking a part out of a DTensor takes the host as long as a launch.
    parts = {module: _part(module) for module in shared}
    if by_row:
        for together in given_alike(model, parts.keys(), parts.__getitem__):
            several = SeveralLayers(together, parts.__getitem__)
            products |= {module: several.forward(number) for number, module in enumerate(together)}

    def made(module: nn.Module) -> Forward:
        style = _style(plan, names[module])
        if style == _TABLE:
            return _of_table(_part(module)[0], group)
        if style == _INPUTS:
            return _of_inputs(*_part(module), group, stream)
        return _gathered(products[module], group) if style in _GATHERED else products[module]

    undo = [replace_forwards(shared, made)]
    if by_row:
        mlps = gated_mlps(model, parts.keys(), parts.__getitem__)
        undo.append(
            replace_forwards(list(mlps), lambda module: of_mlp(module, module.forward, mlps[module], parts.__getitem__))
        )

    def undo_all() -> None:
        for each in reversed(undo):
            each()

    return undo_all


def _style(plan: dict[str, str], name: str) -> str | None:
    """How a module's weights are cut; plans have a star for the numbers of layers."""
    return plan.get(name, plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)))


def _part(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """This process's part of a layer's weight and bias."""
    bias = getattr(module, "bias", None)
    return _local(module.weight), None if bias is None else _local(bias)


def _local(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


def _of_outputs(weight: Tensor, bias: Tensor | None, by_row: bool) -> Forward:
    """This process's outputs of a linear layer."""

    def forward(input: Tensor) -> Tensor:
        if by_row and single(input, weight):
            from ..kernels import matvec  # needs Triton, which is there on GPUs

            return matvec.linear(input, weight, bias)
        return functional.linear(input, weight, bias)

    return forward


def _of_inputs(weight: Tensor, bias: Tensor | None, group: Group, stream: Stream | None) -> Forward:
    """A linear layer of which this process has some of the inputs: the sum over all processes, then the bias."""
    products = _of_outputs(weight, None, stream is not None)

    def forward(input: Tensor) -> Tensor:
        found = products(input)
        total = group.row_sum(found) if input.numel() == input.shape[-1] else group.sum(found)
        return total if bias is None else total + bias

    def onto(input: Tensor, residual: Tensor, norm: RowNorm | None) -> tuple[Tensor, Tensor | None]:
        return group.row_sum_onto(products(input), residual, norm)

    if stream is None or bias is not None:
        return forward
    summand = Summand(stream, weight.shape[0], forward, onto)
    return lambda input: summand(input) if single(input, weight) else forward(input)


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
        return group.row_sum(found) if input.numel() == 1 else group.sum(found)

    return forward
