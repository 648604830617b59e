"""Recurrent layers in prefill: exact under every strategy.

A layer's state runs through rows in order. A rank's rows belong to two sequences: the anchor, which begins anew, and
the document, whose blocks and query carry the state on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..planning.itinerary import Itinerary


class State(Protocol):
    """What a layer knows of the rows so far. It is written in place when further rows are read."""

    def copy(self) -> State:
        """The same state, in other memory."""

    def tensors(self) -> Sequence[Tensor]:
        """All that it consists of, of the same shapes after any number of rows."""


@dataclass(frozen=True)
class RecurrentInput:
    """One recurrent layer's input.

    Attributes:
        index: index of the layer.
        hidden: (1, rows, width) in this rank's row order.
        fresh: makes the state before any row.
        read: reads rows (1, n, width) and carries a state on; the layer's output of these rows.
    """

    index: int
    hidden: Tensor
    fresh: Callable[[], Any]
    read: Callable[[Tensor, Any], Tensor]


# One recurrent layer's input to its output (1, rows, width).
Recur = Callable[[RecurrentInput], Tensor]


def from_the_start(layer: RecurrentInput) -> Tensor:
    """:data:`Recur` of a text whose rows are all there, and whose state is not kept."""
    return layer.read(layer.hidden, layer.fresh())


class RecurrentLayers:
    """The recurrent layers of one round of a prefill, on one rank.

    One rank and one round: what hands a state on to others is refused before anything runs.
    """

    def __init__(self, itinerary: Itinerary) -> None:
        self._query = itinerary.query.rows
        self._anchor = [itinerary.anchor.rows] if itinerary.anchor else []  # a share may have no rows
        rows = [span.rows for span in itinerary.blocks]
        self._blocks = [slice(rows[0].start, rows[-1].stop)] if rows else []  # blocks in order are one run

    def read(self, layer: RecurrentInput, states: dict[int, State], before: dict[int, State]) -> Tensor:
        """Output (1, rows, width) of all rows of this rank.

        Args:
            layer: the layer.
            states: is given the layer's state after the query.
            before: is given the state before the query.
        """
        out = torch.empty_like(layer.hidden)
        self._walk(layer, self._anchor, layer.fresh(), out)
        state = self._walk(layer, self._blocks, layer.fresh(), out)
        before[layer.index] = state.copy()
        out[:, self._query] = layer.read(layer.hidden[:, self._query], state)
        states[layer.index] = state
        return out

    @staticmethod
    def _walk(layer: RecurrentInput, runs: Sequence[slice], state: State, out: Tensor) -> State:
        """Read runs of rows in order, into ``out``; the state after them."""
        for rows in runs:
            if rows.start == rows.stop:  # an anchor of which this rank has no rows
                continue
            out[:, rows] = layer.read(layer.hidden[:, rows], state)
        return state
