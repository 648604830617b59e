"""Recurrent layers of a model: their own modules, called run by run with the state that rows are read from."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..errors import InputError
from ..layers.recurrent import Recur, RecurrentInput, State
from ..planning.memory import CPU_ROWS, GPU_ROWS
from .cache_names import with_cache
from .composing import composable
from .forwards import replace_forwards
from .reference import without_kernels

# Recurrent modules, by the ends of the names of their classes.
_KINDS = ("GatedDeltaNet", "DeltaAttention", "Mixer", "MambaLayer", "ShortConv", "LightningAttention")
# Mamba-1: transformers' scan of several rows begins at zero whatever the state, that of one row does not.
_ROW_BY_ROW = ("MambaMixer",)
_MAMBA_2 = ("Zamba2MambaMixer",)
# Lightning attention: so are several rows from a state, by its own code.
_AT_ONCE = ("LightningAttention",)
_CONV, _RECURRENT, _LIGHTNING = "convolution", "recurrence", "lightning"


class LayerState:
    """The state of one recurrent layer, as transformers' own cache of such a layer holds it."""

    def __init__(self, states: int) -> None:
        self.layer = LinearAttentionLayer(states)
        self.lightning: Tensor | None = None

    def copy(self) -> LayerState:
        """The same state, in other memory."""
        return copy.deepcopy(self)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LayerState:
        """The state that consists of what :meth:`tensors` returned."""
        state = cls(max((int(name.rpartition(".")[2]) + 1 for name in tensors if "." in name), default=1))
        state.lightning = tensors.get(_LIGHTNING)
        _write(tensors, state.layer)
        return state

    def tensors(self) -> Mapping[str, Tensor]:
        """Columns of the convolution and states, of the same shapes after any number of rows; none before any."""
        held = {
            **{f"{_CONV}.{number}": part for number, part in self.layer.conv_states.items()},
            **{f"{_RECURRENT}.{number}": part for number, part in self.layer.recurrent_states.items()},
            _LIGHTNING: self.lightning,
        }
        return {name: part for name, part in held.items() if part is not None}

    def copy_into(self, layer: Any) -> None:
        """Make it the state of a layer of transformers' own cache; InputError if that has none for it."""
        if self.lightning is not None:
            raise InputError("MiniMax's code in transformers has a cache of its own; answer with this session instead.")
        _write(self.tensors(), layer)

    def to(self, device: torch.device) -> LayerState:
        """The same state on a device; this one, if it is there."""
        parts = self.tensors()
        if all(part.device == device for part in parts.values()):
            return self
        return LayerState.of({name: part.to(device) for name, part in parts.items()})


def _write(tensors: Mapping[str, Tensor], layer: Any) -> None:
    """Write the states of a layer of transformers' own cache."""
    for name, part in tensors.items():
        kind, _, number = name.partition(".")
        if kind == _CONV:
            layer.update_conv_state(part, int(number))
        elif kind == _RECURRENT:
            layer.update_recurrent_state(part, int(number))


class _Single(Cache):
    """A cache of one layer, whatever its index, as the layer's module sees it."""

    def __init__(self, state: LayerState, index: int) -> None:
        self._state = state
        super().__init__(layers=[state.layer] * (index + 1))

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The state of lightning attention (MiniMax)."""
        return self._state.lightning

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Overwrite it, where it is."""
        if self._state.lightning is None:
            self._state.lightning = linear_cache
        else:
            self._state.lightning.copy_(linear_cache)


def named_states(states: Mapping[int, State], name: str) -> dict[str, Tensor]:
    """The tensors of states by layer, on the host, under names that begin with ``name``."""
    return {
        f"{name}.{layer}.{part}": tensor.cpu().contiguous()
        for layer, state in states.items()
        for part, tensor in state.tensors().items()
    }


def states_named(
    names: Iterable[str], name: str, read: Callable[[str], Tensor], device_of: Callable[[int], torch.device]
) -> dict[int, State]:
    """The states of :func:`named_states` by layer, on the devices of their layers; ``read``: the tensor of a name."""
    parts: dict[int, dict[str, Tensor]] = {}
    for each in names:
        if each.startswith(f"{name}."):
            layer, _, part = each.removeprefix(f"{name}.").partition(".")
            parts.setdefault(int(layer), {})[part] = read(each).to(device_of(int(layer)))
    return {layer: LayerState.of(tensors) for layer, tensors in parts.items()}


def recurrent_modules(model: nn.Module) -> list[nn.Module]:
    """The module of every recurrent layer, in order."""
    return [
        module for module in model.modules() if hasattr(module, "layer_idx") and type(module).__name__.endswith(_KINDS)
    ]


def state_of(module: nn.Module, text: Any) -> LayerState:
    """The state of a recurrent module after a row, for its shapes: on the meta device it costs nothing."""
    state = LayerState(_state_count(text))
    parameters = inspect.signature(module.forward).parameters
    needed = [
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    weight = next(module.parameters())
    row = torch.empty(1, 1, text.hidden_size, dtype=weight.dtype, device=weight.device)
    cache = with_cache(module, _Single(state, int(module.layer_idx)))  # type: ignore[arg-type]
    with torch.no_grad(), without_kernels(module):
        module.forward(**dict.fromkeys(needed) | {next(iter(parameters)): row} | cache)
    return state


def take_over(model: PreTrainedModel, recur: Callable[[], Recur | None]) -> Callable[[], None]:
    """Have every recurrent module of a model called by what ``recur`` returns; returns a function that undoes it.

    While that is None modules are called as ever.
    """
    states = _state_count(model.config.get_text_config())
    return replace_forwards(recurrent_modules(model), lambda module: _by_runs(module, states, recur))


def _state_count(text: Any) -> int:
    return int(getattr(text, "number_of_conv_states", None) or 1)


def _by_runs(module: nn.Module, states: int, recur: Callable[[], Recur | None]) -> Callable[..., Any]:
    original = module.forward
    parameters = inspect.signature(original).parameters
    rows_name, index = next(iter(parameters)), int(module.layer_idx)  # type: ignore[arg-type]
    name = type(module).__name__
    composed_by = composable(module, original)
    one_by_one = name.endswith(_ROW_BY_ROW) and name not in _MAMBA_2
    in_pieces = not one_by_one and not name.endswith(_AT_ONCE)

    def run(*args: Any, **kwargs: Any) -> Any:
        reader = recur()
        if reader is None:
            return original(*args, **kwargs)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        rest: list[Any] = []

        def read(rows: Tensor, state: LayerState) -> Tensor:
            result = original(**given | {rows_name: rows} | with_cache(module, _Single(state, index)))
            out, *rest[:] = result if isinstance(result, tuple) else (result,)
            return out

        def read_on(rows: Tensor, state: LayerState) -> Tensor:
            if one_by_one and rows.shape[1] > 1 and state.tensors():
                return torch.cat([read(row, state) for row in rows.split(1, 1)], 1)
            # What a layer holds for a row is several times as wide as the row: as with MLPs, a part of them at a time.
            most = CPU_ROWS if rows.device.type == "cpu" else GPU_ROWS
            if in_pieces and rows.shape[1] > most:
                return torch.cat([read(piece, state) for piece in rows.split(most, 1)], 1)
            return read(rows, state)

        runs = None if composed_by is None else composed_by(read)
        out = reader(RecurrentInput(index, given[rows_name], lambda: LayerState(states), read_on, runs))
        return (out, *rest) if rest else out

    return run
