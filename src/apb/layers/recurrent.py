"""Recurrent layers in prefill: exact under every strategy.

A layer's state runs through rows in order. A rank's rows belong to two sequences: the anchor, which begins anew, and
the document, whose blocks carry the state on from rank to rank; the query's rows start after the last block read, on
every rank. Rows that follow each other on one rank are one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed.collectives import Group
from ..planning.itinerary import Itinerary, Kind, Span
from ..timing import timed


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


@dataclass(frozen=True)
class Run:
    """Rows [row, stop) of rank ``rank``, which follow each other in a sequence."""

    rank: int
    row: int
    stop: int


class RecurrentLayers:
    """The recurrent layers of one round of a prefill, on one rank.

    The state is handed from run to run: ranks wait for each other here, which costs the time of all rows on each.
    """

    def __init__(self, itinerary: Itinerary, group: Group) -> None:
        plan, round = itinerary.plan, itinerary.round
        self._group = group
        self._query = itinerary.query.rows
        self._last = itinerary.last
        spans = [(rank, span) for rank in range(plan.ranks) for span in plan.spans(rank, round)]
        self._anchor = runs(spans, Kind.ANCHOR)
        self._blocks = runs(spans, Kind.BLOCK)

    def read(self, layer: RecurrentInput, states: dict[int, State], before: dict[int, State]) -> Tensor:
        """Output (1, rows, width) of all rows of this rank.

        Args:
            layer: the layer.
            states: by layer the state after the blocks of earlier rounds; on return after those of this round and, in
                the last one, after the query.
            before: is given the state before the query.
        """
        out = torch.empty_like(layer.hidden)
        self._walk(layer, self._anchor, layer.fresh(), out)
        state = self._walk(layer, self._blocks, states.get(layer.index, layer.fresh()), out)
        after = state.copy()
        out[:, self._query] = layer.read(layer.hidden[:, self._query], after)
        states[layer.index], before[layer.index] = (after, state) if self._last else (state, state)
        return out

    def _walk(self, layer: RecurrentInput, sequence: Sequence[Run], state: State, out: Tensor) -> State:
        """Read a sequence's runs in order, this rank's own into ``out``; the state after them, on every rank."""
        alone = self._group.size == 1
        for run in sequence:
            if run.rank == self._group.rank:
                out[:, run.row : run.stop] = layer.read(layer.hidden[:, run.row : run.stop], state)
            elif not state.tensors():  # its shapes are those after any row
                layer.read(layer.hidden[:, -1:], state)
            if not alone:
                with timed("communication"):
                    for part in state.tensors():
                        self._group.broadcast(part, run.rank)
        return state


def runs(spans: Sequence[tuple[int, Span]], kind: Kind) -> list[Run]:
    """The spans of one kind of all ranks, (rank, span) each, in order of position; adjacent ones are joined."""
    found: list[Run] = []
    ordered = sorted(((rank, span) for rank, span in spans if span.kind is kind), key=lambda pair: pair[1].start)
    for rank, span in ordered:
        if not len(span):
            continue
        if found and (found[-1].rank, found[-1].stop) == (rank, span.row):
            found[-1] = Run(rank, found[-1].row, span.rows.stop)
        else:
            found.append(Run(rank, *span.bounds))
    return found
