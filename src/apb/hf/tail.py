"""What is cut off the end of a shard, to be put back later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layers.recurrent import State


@dataclass(frozen=True)
class Tail:
    """The last tokens of a shard: by layer keys, values (1, kv_heads, tokens, head_dim) and true positions.

    ``total`` is the number of tokens of all ranks with them, ``states`` those of recurrent layers after them.
    """

    layers: dict[int, tuple[Tensor, Tensor, list[range]]]
    total: int
    states: Mapping[int, State] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its keys, values and states."""
        return sum(x.nbytes for keys, values, _ in self.layers.values() for x in (keys, values)) + bytes_of(self.states)

    def to(self, device_of: Callable[[int], torch.device]) -> Tail:
        """The same tokens, each layer's on its device."""
        layers = {
            layer: (keys.to(device_of(layer)), values.to(device_of(layer)), positions)
            for layer, (keys, values, positions) in self.layers.items()
        }
        states = {layer: state.to(device_of(layer)) for layer, state in self.states.items()}
        return Tail(layers, self.total, states)


def bytes_of(states: Mapping[int, State]) -> int:
    """Bytes of the states of recurrent layers."""
    return sum(part.nbytes for state in states.values() for part in state.tensors().values())
