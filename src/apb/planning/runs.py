"""The rows that a recurrent layer's state runs through, in order, wherever they are. Pure Python.

A state goes through the anchor's rows from its first one on, and through the document's, which the query's follow. The
rank that holds the next rows waits for the state after those before them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .itinerary import Kind
from .plan import Plan


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


def rows_of_others(plan: Plan, rank: int) -> int:
    """Rows that other ranks read in all rounds while this one waits: one rank after the other reads its own."""
    rows = 0
    for round in range(plan.rounds):
        shared = [anchor for anchor in anchor_runs(plan, round) if len(anchor) > 1]
        rows += sum(len(run) for runs in (*shared, document_runs(plan, round)) for run in runs if run.rank != rank)
    return rows


def _runs(plan: Plan, round: int, kind: Kind) -> list[Run]:
    found = [
        Run(rank, span.start, span.stop, span.row)
        for rank in range(plan.ranks)
        for span in plan.spans(rank, round)
        if span.kind is kind and len(span)
    ]
    return sorted(found, key=lambda run: run.start)
