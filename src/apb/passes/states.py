"""States of recurrent layers in decode steps: what a captured step reads and writes stays where it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers.recurrent import RecurrentInput, State


class FixedStates:
    """A state of every recurrent layer, at addresses that do not change: those of a session while its token is read."""

    def __init__(self, like: Mapping[int, State]) -> None:
        """Make states of the shapes of these, by layer; none, if there are none."""
        self._states = {layer: state.copy() for layer, state in like.items()}
        self._parts = _parts(self._states)

    def recur(self, layer: RecurrentInput) -> Tensor:
        """:data:`apb.layers.recurrent.Recur` of one row."""
        state = self._states[layer.index]
        before = list(state.tensors().values())
        out = layer.read(layer.hidden, state)
        assert all(x is y for x, y in zip(before, state.tensors().values(), strict=True)), "states stay where they are"
        return out

    def take(self, states: Mapping[int, State]) -> None:
        """Be what these are; copies are queued, nothing waits."""
        _copy(_parts(states), self._parts)

    def give(self, states: Mapping[int, State]) -> None:
        """Make these what the own ones are, in place."""
        _copy(self._parts, _parts(states))


# What states consist of, by dtype, in the order of layers.
_Parts = dict[torch.dtype, list[Tensor]]


def _parts(states: Mapping[int, State]) -> _Parts:
    parts: _Parts = {}
    for _, state in sorted(states.items()):
        for part in state.tensors().values():
            parts.setdefault(part.dtype, []).append(part)
    return parts


def _copy(source: _Parts, into: _Parts) -> None:
    """One launch for all of a dtype."""
    assert source.keys() == into.keys(), "states of one model have the same dtypes"
    for dtype, parts in into.items():
        torch._foreach_copy_(parts, source[dtype])
