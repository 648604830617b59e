"""The rows of one rank in one pass of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..prompt import Prompt
    from .plan import Plan


class Kind(Enum):
    """The kind of a span's rows."""

    ANCHOR = "anchor"
    BLOCK = "block"
    QUERY = "query"


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one rank's forward pass: rows [row, row + len) stand at positions [start, stop)."""

    kind: Kind
    start: int
    stop: int
    row: int
    block: int = -1

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def bounds(self) -> tuple[int, int]:
        """(first, last + 1) of these rows in the rank's row order."""
        return self.row, self.row + len(self)

    @property
    def rows(self) -> slice:
        """The slice of these rows in the rank's row order."""
        return slice(*self.bounds)


@dataclass(frozen=True)
class Itinerary:
    """One rank's rows in one round of a plan: their order, their positions, and which of them the cache keeps.

    The model's pass, its cache, and everything that inspects a pass take the rows from here.

    Attributes:
        plan, rank, round: the plan, and the rank and round of the rows.
        spans: the rank's share of the anchor (first round), its blocks, then the query, in row order.
    """

    plan: Plan
    rank: int
    round: int
    spans: tuple[Span, ...]

    @property
    def last(self) -> bool:
        """True if no round follows."""
        return self.round == self.plan.rounds - 1

    @cached_property
    def anchor(self) -> Span | None:
        """The rank's share of the anchor, if it has one in this round."""
        return next((span for span in self.spans if span.kind is Kind.ANCHOR), None)

    @cached_property
    def blocks(self) -> tuple[Span, ...]:
        """The blocks, in document order."""
        return tuple(span for span in self.spans if span.kind is Kind.BLOCK)

    @property
    def block_rows(self) -> slice:
        """Rows of the blocks."""
        return self._from_blocks(with_query=False)

    @cached_property
    def query(self) -> Span:
        """The query's rows, which every rank runs in every round."""
        return self.spans[-1]

    @property
    def owns_tail(self) -> bool:
        """True if this rank's cache takes the keys and values of the query and of generated tokens."""
        return self.rank == self.plan.tail_rank

    @property
    def kept(self) -> slice:
        """Rows whose keys and values the cache keeps: the blocks and, on the tail rank in the last round, the query."""
        return self._from_blocks(with_query=self.owns_tail and self.last)

    @property
    def kept_positions(self) -> tuple[range, ...]:
        """True positions of :attr:`kept`'s rows, in order."""
        return self._positions(with_query=self.owns_tail and self.last)

    @property
    def shard(self) -> slice:
        """Rows whose keys the query's rows attend to on this rank: the blocks and, on the tail rank, the query."""
        return self._from_blocks(with_query=self.owns_tail)

    @cached_property
    def shard_positions(self) -> tuple[range, ...]:
        """True positions of :attr:`shard`'s rows, in order."""
        return self._positions(with_query=self.owns_tail)

    @cached_property
    def earlier(self) -> tuple[range, ...]:
        """True positions of this rank's blocks of earlier rounds, in the order in which its cache holds them."""
        owned = self.plan.owned(self.rank)
        return tuple(range(block.start, block.stop) for block in owned if block.round < self.round)

    def positions(self) -> list[int]:
        """Positions of all rows, in order."""
        return [position for span in self.spans for position in range(span.start, span.stop)]

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of all rows, in order."""
        whole: Sequence[int] = prompt.token_ids
        anchor: Sequence[int] = ()
        if self.anchor is not None:
            anchor = self.plan.anchor_tokens(prompt.prefix, prompt.document, prompt.query)
        ids: list[int] = []
        for span in self.spans:
            ids += (anchor if span is self.anchor else whole)[span.start : span.stop]
        return ids

    def rows_of(self, positions: Sequence[int]) -> list[int]:
        """Rows of blocks and query at these positions of the prompt; those of other ranks or rounds are left out."""
        return [
            position - span.start + span.row
            for position in positions
            for span in self.spans
            if span is not self.anchor and span.start <= position < span.stop
        ]

    def _from_blocks(self, with_query: bool) -> slice:
        start = len(self.anchor) if self.anchor else 0
        return slice(start, self.query.rows.stop if with_query else self.query.row)

    def _positions(self, with_query: bool) -> tuple[range, ...]:
        spans = (*self.blocks, self.query) if with_query else self.blocks
        return tuple(range(span.start, span.stop) for span in spans)
