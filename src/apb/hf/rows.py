"""Other rows in the upper layers of a pass than in the lower ones: by hooks, the model's code untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError

# The rows of a tensor (1, rows, ...) that go on: (1, other rows, ...).
Move = Callable[[Tensor], Tensor]
# Of torch's message when a tensor is viewed in the shape of another: GPT-J's family ends so.
_OF_ALL_ROWS = "invalid for input of size"


@contextmanager
def other_rows(model: PreTrainedModel, attentions: Sequence[nn.Module], first: int, move: Move) -> Iterator[None]:
    """Let the layers from ``first`` on run over the rows that ``move`` makes of the rows of the pass.

    What the model gives its layers by row, as embeddings of positions, is moved too; the same tensor is moved once for
    each layer that it is given to, and first of all the hidden states.

    Args:
        model: the model.
        attentions: the attention module of every layer.
        first: index of the first layer that runs over the other rows.
        move: see :data:`Move`.

    Raises:
        InputError: the model gives its layers something that has rows in a way that is not known.
    """
    layers = decoder_layers(model, attentions)
    rows = 0

    def before(index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            nonlocal rows
            inputs = dict(kwargs)
            hidden = args[0] if args else inputs.pop("hidden_states", None)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3:
                raise InputError(f"{_cannot(model)}: its layers do not take one row of hidden states for each token.")
            if index == first:
                rows = hidden.shape[1]
                hidden = move(hidden)
            others = tuple(_moved(model, "an input", value, rows, move) for value in args[1:])
            inputs = {name: _moved(model, name, value, rows, move) for name, value in inputs.items()}
            return ((hidden, *others), inputs) if args else ((), {"hidden_states": hidden, **inputs})

        return hook

    handles = [
        layer.register_forward_pre_hook(before(index), with_kwargs=True)
        for index, layer in enumerate(layers)
        if index >= first
    ]
    try:
        yield
    except RuntimeError as error:
        if _OF_ALL_ROWS not in str(error):
            raise
        raise InputError(f"{_cannot(model)}: it arranges what its layers give as if all rows went on.") from error
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: PreTrainedModel, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """The decoder layer that each attention module is in, an item of a list of modules; InputError if there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for attention in attentions:
        name = names[id(attention)]
        while name and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList):
            name = name.rpartition(".")[0]
        if not name:
            raise InputError(f"{_cannot(model)}: its layers are not a list of modules.")
        found.append(model.get_submodule(name))
    if len(set(map(id, found))) != len(found) or not {id(layer) for layer in found}.isdisjoint(map(id, attentions)):
        raise InputError(f"{_cannot(model)}: some of its layers have several attention modules.")
    return found


def _moved(model: PreTrainedModel, name: str, value: Any, rows: int, move: Move) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(model, name, each, rows, move) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() < 2 or value.shape[:2] != (1, rows):
        raise InputError(f"{_cannot(model)}: it gives its layers {name!r} of shape {tuple(value.shape)}.")
    return move(value)


def _cannot(model: PreTrainedModel) -> str:
    return f"Propagation cannot select the rows of {type(model).__name__}, so leave it off"
