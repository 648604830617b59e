"""Recurrent layers of a model: their own modules, called run by run with the state that rows are read from."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..layers.recurrent import Recur, RecurrentInput

# Mixers of most families name their cache so; the others are known by their class.
_ARGUMENT = "cache_params"
_OTHERS = ("ShortConv", "LightningAttention")
# Mamba-1: transformers' scan of several rows begins at zero whatever the state, that of one row does not.
_ROW_BY_ROW = ("MambaMixer",)
_MAMBA_2 = ("Zamba2MambaMixer",)


class LayerState:
    """The state of one recurrent layer, as transformers' own cache of such a layer holds it."""

    def __init__(self, states: int) -> None:
        self.layer = LinearAttentionLayer(states)
        self.lightning: Tensor | None = None

    def copy(self) -> LayerState:
        """The same state, in other memory."""
        return copy.deepcopy(self)

    def tensors(self) -> Sequence[Tensor]:
        """Columns of the convolution and states, of the same shapes after any number of rows; none before any."""
        held = (*self.layer.conv_states.values(), *self.layer.recurrent_states.values(), self.lightning)
        return [part for part in held if part is not None]


class _Single(Cache):
    """A cache of one layer, whatever its index, as the layer's module sees it."""

    def __init__(self, state: LayerState, index: int) -> None:
        self._state = state
        super().__init__(layers=[state.layer] * (index + 1))

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The state of lightning attention (MiniMax)."""
        return self._state.lightning

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Replace it."""
        self._state.lightning = linear_cache


def recurrent_modules(model: nn.Module) -> list[nn.Module]:
    """The module of every recurrent layer, in order."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and _is_recurrent(type(module))]


def _is_recurrent(kind: type[nn.Module]) -> bool:
    return kind.__name__.endswith(_OTHERS) or _ARGUMENT in inspect.signature(kind.forward).parameters


def take_over(model: PreTrainedModel, recur: Callable[[], Recur | None]) -> Callable[[], None]:
    """Have every recurrent module of a model called by what ``recur`` returns; returns a function that undoes it.

    While that is None modules are called as ever.
    """
    modules = recurrent_modules(model)
    before = [vars(module).get("forward") for module in modules]
    states = int(getattr(model.config.get_text_config(), "number_of_conv_states", None) or 1)
    for module in modules:
        module.forward = _by_runs(module, states, recur)

    def undo() -> None:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward

    return undo


def _by_runs(module: nn.Module, states: int, recur: Callable[[], Recur | None]) -> Callable[..., Any]:
    original = module.forward
    parameters = inspect.signature(original).parameters
    rows_name, index = next(iter(parameters)), int(module.layer_idx)  # type: ignore[arg-type]
    cache_name = _ARGUMENT if _ARGUMENT in parameters else "past_key_values"
    name = type(module).__name__
    one_by_one = name.endswith(_ROW_BY_ROW) and name not in _MAMBA_2

    def run(*args: Any, **kwargs: Any) -> Any:
        reader = recur()
        if reader is None:
            return original(*args, **kwargs)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        rest: list[Any] = []

        def read(rows: Tensor, state: LayerState) -> Tensor:
            result = original(**given | {rows_name: rows, cache_name: _Single(state, index)})
            out, *rest[:] = result if isinstance(result, tuple) else (result,)
            return out

        def read_on(rows: Tensor, state: LayerState) -> Tensor:
            if one_by_one and rows.shape[1] > 1 and state.tensors():
                return torch.cat([read(row, state) for row in rows.split(1, 1)], 1)
            return read(rows, state)

        out = reader(RecurrentInput(index, given[rows_name], lambda: LayerState(states), read_on))
        return (out, *rest) if rest else out

    return run
