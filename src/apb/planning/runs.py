"""The rows that a recurrent layer's state runs through, in order, wherever they are. Pure Python.

A state goes through the anchor's rows from its first one on, and through the document's, which the query's follow. The
rank that holds the next rows waits for the state after those before them, unless what the document's runs do to it is
composed (layers/composing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .itinerary import Kind
from .plan import Plan

# Rows of the shortest run that is composed: more than a convolution looks back.
LEAST_COMPOSED = 16
# Most rows that a rank reads at once to compose its runs, and which therefore cannot be read in pieces: what a layer
# holds of them, see ALIVE_IN_COMPOSITION, is a few GiB on a GPU; on the CPU, where the layers' own functions hold more,
# it is less.
CPU_COMPOSED = 8192
GPU_COMPOSED = 65536


@dataclass(frozen=True)
class Run:
    """Tokens at positions [start, stop), in consecutive rows of a rank from ``row`` on."""

    rank: int
    start: int
    stop: int
    row: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """The slice of these rows in the rank's row order."""
        return slice(self.row, self.row + len(self))


def anchor_runs(plan: Plan, round: int) -> list[list[Run]]:
    """The anchors that are read in a round, each from its beginning: all ranks share one, or some have their own."""
    sequences: list[list[Run]] = []
    for run in _runs(plan, round, Kind.ANCHOR):
        if run.start == 0:
            sequences.append([])
        sequences[-1].append(run)
    return sequences


def document_runs(plan: Plan, round: int) -> list[Run]:
    """The blocks of a round in document order; those that follow each other on one rank are one run."""
    joined: list[Run] = []
    for run in _runs(plan, round, Kind.BLOCK):
        if joined and joined[-1].rank == run.rank:
            joined[-1] = replace(joined[-1], stop=run.stop)
        else:
            joined.append(run)
    return joined


def composed(plan: Plan, round: int, most: int) -> bool:
    """True if layers whose runs can be composed do so with the document's of a round, of which no rank has over
    ``most`` rows: as soon as a rank would wait for another one.

    All ranks then read at once, by a rule that takes less than twice as long; handed on, a state takes as long as all
    ranks' rows.
    """
    runs = document_runs(plan, round)
    return len(runs) > 1 and min(map(len, runs)) >= LEAST_COMPOSED and max(_rows_by_rank(plan, runs)) <= most


def rows_composed(plan: Plan, rank: int, round: int, most: int) -> int:
    """Rows of a rank's runs in a round if they are composed, else 0."""
    return _rows_by_rank(plan, document_runs(plan, round))[rank] if composed(plan, round, most) else 0


def rows_of_others(plan: Plan, rank: int, most: int = 0) -> int:
    """Rows that other ranks read in all rounds while this one waits: one rank after the other reads its own.

    ``most``: rows of a rank that are composed, see :func:`composed`; 0 in layers whose runs cannot be.
    """
    rows = 0
    for round in range(plan.rounds):
        sequences = [anchor for anchor in anchor_runs(plan, round) if len(anchor) > 1]
        if not composed(plan, round, most):
            sequences.append(document_runs(plan, round))
        rows += sum(len(run) for runs in sequences for run in runs if run.rank != rank)
    return rows


def _rows_by_rank(plan: Plan, runs: Sequence[Run]) -> list[int]:
    return [sum(len(run) for run in runs if run.rank == rank) for rank in range(plan.ranks)]


def _runs(plan: Plan, round: int, kind: Kind) -> list[Run]:
    found = [
        Run(rank, span.start, span.stop, span.row)
        for rank in range(plan.ranks)
        for span in plan.spans(rank, round)
        if span.kind is kind and len(span)
    ]
    return sorted(found, key=lambda run: run.start)
