"""The exchange of keys on layers with a window, sliding or chunked: the window is an exact halo. Pure Python.

On such layers no strategy approximates: a row of the document sees exactly the keys in the model's window, and those
held by another rank are sent. The anchor's rows, if any, see only the anchor's keys in the window.
"""

from __future__ import annotations

from dataclasses import dataclass

from .itinerary import Kind, Span
from .plan import Plan


@dataclass(frozen=True)
class Piece:
    """Keys at positions [start, stop) among rank ``sender``'s rows, needed by ``span`` of rank ``receiver``.

    ``row`` is the index of the first in the sender's rows or, if ``early``, in its blocks of earlier rounds. Sender and
    receiver may be the same rank.
    """

    sender: int
    receiver: int
    span: Span
    early: bool
    row: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def first_seen(position: int, window: int, chunked: bool) -> int:
    """Position of the first key that a row sees, below 0 where the window is not full yet."""
    return position // window * window if chunked else position - window + 1


def pieces(plan: Plan, window: int, round: int = 0, chunked: bool = False) -> list[Piece]:
    """All halos of a layer in a round, by receiver, span, and position; those of a span are contiguous."""
    found = []
    spans = [[span for span in plan.spans(rank, round) if span.kind is not Kind.QUERY] for rank in range(plan.ranks)]
    sources = [(span, rank, False) for rank, owned in enumerate(spans) for span in owned if len(span)]
    for rank in range(plan.ranks):
        row = 0
        for block in plan.owned(rank):
            if block.round < round:
                sources.append((Span(Kind.BLOCK, block.start, block.stop, row, block.index), rank, True))
                row += len(block)
    sources.sort(key=lambda source: source[0].start)
    for receiver, owned in enumerate(spans):
        for span in owned:
            needed = max(first_seen(span.start, window, chunked), 0)
            for source, sender, early in sources if len(span) else ():
                start, stop = max(source.start, needed), min(source.stop, span.start)
                if source.kind is span.kind and start < stop:
                    row = source.row + start - source.start
                    found.append(Piece(sender, receiver, span, early, row, start, stop))
    return found


def sent_rows(plan: Plan, window: int, chunked: bool = False) -> list[list[int]]:
    """``[sender][receiver]``: keys sent on a layer with such a window, in all rounds; 0 from a rank to itself."""
    sent = [[0] * plan.ranks for _ in range(plan.ranks)]
    for round in range(plan.rounds):
        for piece in pieces(plan, window, round, chunked):
            if piece.sender != piece.receiver:
                sent[piece.sender][piece.receiver] += len(piece)
    return sent
