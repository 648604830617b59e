"""Recurrent layers in prefill: exact under every strategy.

A layer's state runs through rows in order. There are two sequences of them, the anchor, which begins anew, and the
document, whose blocks and query carry the state on, from rank to rank and from round to round: the rank that has read a
run of rows hands the state on to the one that holds the next; or all read at once, where what the document's runs do to
the state can be composed. All ranks get the state after the last block, and read the query's rows from there, as they
read further tokens: every rank holds the final state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed.collectives import Group, Pending
from ..hardware import most_composed
from ..planning.itinerary import Itinerary
from ..planning.runs import Run, anchor_runs, composed, document_runs
from ..timing import timed
from .composing import Composable, Composition


class State(Protocol):
    """What a layer knows of the rows so far. It is written in place when further rows are read."""

    def copy(self) -> State:
        """The same state, in other memory."""

    def tensors(self) -> Mapping[str, Tensor]:
        """All that it consists of, by name, of the same shapes after any number of rows; none before any."""

    def copy_into(self, layer: Any) -> None:
        """Make it the state of a layer of transformers' own cache."""

    def to(self, device: torch.device) -> State:
        """The same state on a device; it may be this one."""


@dataclass(frozen=True)
class RecurrentInput:
    """One recurrent layer's input.

    Attributes:
        index: index of the layer.
        hidden: (1, rows, width) in this rank's row order.
        fresh: makes the state before any row.
        read: reads rows (1, n, width) and carries a state on; the layer's output of these rows.
        composable: reads runs that are composed; None where they cannot be.
    """

    index: int
    hidden: Tensor
    fresh: Callable[[], Any]
    read: Callable[[Tensor, Any], Tensor]
    composable: Composable | None = None


# One recurrent layer's input to its output (1, rows, width).
Recur = Callable[[RecurrentInput], Tensor]


def from_the_start(layer: RecurrentInput) -> Tensor:
    """:data:`Recur` of a text whose rows are all there, and whose state is not kept."""
    return layer.read(layer.hidden, layer.fresh())


class RecurrentLayers:
    """The recurrent layers of one round of a prefill, on one rank."""

    def __init__(self, itinerary: Itinerary, group: Group, device: torch.device) -> None:
        self._group = group
        self._query = itinerary.query.rows
        self._anchors = anchor_runs(itinerary.plan, itinerary.round)
        self._document = document_runs(itinerary.plan, itinerary.round)
        composes = composed(itinerary.plan, itinerary.round, most_composed(device))
        self._composition = Composition(self._document, group) if composes else None

    def read(self, layer: RecurrentInput, states: dict[int, State], before: dict[int, State]) -> Tensor:
        """Output (1, rows, width) of all rows of this rank; every rank calls it for every layer.

        Args:
            layer: the layer.
            states: is given the layer's state after the query.
            before: has the state after the blocks of earlier rounds, if any; is given that before the query.
        """
        out = torch.empty_like(layer.hidden)
        sent: list[Pending] = []
        # Every rank goes through what is sent and received in the same order, so that none waits in a circle.
        for anchor in self._anchors:
            self._walk(layer, anchor, layer.fresh(), out, sent)
        state = before.get(layer.index) or layer.fresh()
        if layer.composable is not None and self._composition is not None:
            self._composition.read(layer.composable, layer.hidden, state, out)
        else:
            state = self._walk(layer, self._document, state, out, sent)
        state = self._share(layer, state, self._document[-1].rank)
        for each in sent:
            each.wait()
        before[layer.index] = state.copy()
        out[:, self._query] = self._read(layer, self._query, state)
        states[layer.index] = state
        return out

    def _walk(
        self, layer: RecurrentInput, runs: Sequence[Run], state: State, out: Tensor, sent: list[Pending]
    ) -> State:
        """Read this rank's runs of a sequence, into ``out``; the state after the last of them, ``state`` if none."""
        for place, run in enumerate(runs):
            if run.rank != self._group.rank:
                continue
            if place:
                state = self._like(layer, state)
                with timed("communication"):
                    _unpack(self._group.receive(_pack(state), runs[place - 1].rank), state)
            out[:, run.rows] = self._read(layer, run.rows, state)
            if place + 1 < len(runs):
                sent.append(self._group.send(_pack(state), runs[place + 1].rank))
        return state

    def _share(self, layer: RecurrentInput, state: State, source: int) -> State:
        """The state that rank ``source`` has, on every rank."""
        if self._group.size == 1:
            return state
        state = self._like(layer, state)
        with timed("communication"):
            _unpack(self._group.broadcast(_pack(state), source), state)
        return state

    @staticmethod
    def _read(layer: RecurrentInput, rows: slice, state: State) -> Tensor:
        with timed("recurrent"):
            return layer.read(layer.hidden[:, rows], state)

    @staticmethod
    def _like(layer: RecurrentInput, state: State) -> State:
        """A state to be overwritten: this one, or that after any row, which has the shapes of all others."""
        if not state.tensors():
            layer.read(layer.hidden[:, :1], state)
        return state


def _pack(state: State) -> Tensor:
    """A message of all that a state consists of: its bytes."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in state.tensors().values()])


def _unpack(message: Tensor, state: State) -> None:
    """Overwrite a state by a message."""
    parts = state.tensors().values()
    for part, piece in zip(parts, message.split([part.nbytes for part in parts]), strict=True):
        part.copy_(piece.clone().view(part.dtype).view(part.shape))  # a copy begins where numbers may
