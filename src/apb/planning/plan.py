"""The rows and positions that every rank computes: pure Python arithmetic, decided before anything runs.

Nothing here allocates memory in proportion to the document: a plan for ten million tokens is as small as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import InputError, at_least
from .itinerary import Itinerary, Kind, Span
from .methods import METHODS, Full, Method, Ring, make_method
from .options import options_of
from .propagation import Propagation

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A contiguous slice of the document, at true positions [start, stop); block 0 also holds the prefix."""

    index: int
    start: int
    stop: int
    rank: int
    round: int

    def __len__(self) -> int:
        return self.stop - self.start


# The lower limit of each size of a request.
_LEAST = {"prefix": 0, "document": 1, "query": 1, "ranks": 1, "rounds": 1}


@dataclass(frozen=True)
class Plan:
    """An immutable plan of one prefill. Make one with :meth:`build` or :meth:`of_method`.

    Attributes:
        method: the strategy, settled: none of its options is open.
        prefix, document, query: lengths in tokens.
        ranks: number of processes, each with one device.
        rounds: number of forward passes over which the blocks are spread (consecutive blocks share a round).
        reason: the reason for this strategy, unless the user chose it.
        propagation: which rows go on above a layer, with its layer filled in; None: all rows go through all layers.
    """

    method: Method
    prefix: int
    document: int
    query: int
    ranks: int
    rounds: int
    reason: str | None = None
    propagation: Propagation | None = None

    @classmethod
    def build(
        cls,
        prefix: int,
        document: int,
        query: int,
        blocks: int | None = None,
        ranks: int = 1,
        anchor_length: int | None = None,
        passing_length: int | None = None,
        strategy: str | Method = "apb",
        rounds: int = 1,
        **options: Any,
    ) -> Plan:
        """A plan with open options filled in; raises InputError if there is none.

        Options that the strategy does not have are ignored: exact methods choose their blocks themselves, and have
        neither anchor nor passing blocks. With one block there is nothing to approximate: anchor and passing lengths
        are then 0, whatever the options.
        """
        sizes = {"blocks": blocks, "anchor_length": anchor_length, "passing_length": passing_length, **options}
        return cls.of_method(make_method(strategy, sizes), prefix, document, query, ranks, rounds)

    @classmethod
    def of_method(cls, method: Method, prefix: int, document: int, query: int, ranks: int = 1, rounds: int = 1) -> Plan:
        """The plan of a method, whose open options are filled in; raises InputError if there is none."""
        for name, size in {
            "prefix": prefix, "document": document, "query": query, "ranks": ranks, "rounds": rounds
        }.items():  # fmt: skip
            at_least(name, size, _LEAST[name])
        plan = cls(method.settled(prefix, document, query, ranks), prefix, document, query, ranks, rounds)
        if rounds > 1 and not method.in_rounds:
            names = " or ".join(name for name, each in METHODS.items() if each.in_rounds)
            raise InputError(
                f"The strategy {method.name!r} reads in one round, not {rounds}; only {names} can take more."
            )
        if rounds > plan.blocks:
            raise InputError(
                f"{rounds} rounds need at least as many blocks, but there are {plan.blocks}; ask for fewer."
            )
        return plan

    # -- the document ------------------------------------------------------------------------------------------------

    @property
    def strategy(self) -> str:
        """Name of the method."""
        return self.method.name

    @property
    def blocks(self) -> int:
        """Number of blocks H that the document is cut into."""
        return self.method.block_count(self.ranks)

    @property
    def anchor_length(self) -> int:
        """l_a, tokens of the anchor; 0 if there is none."""
        return self.method.anchor_length

    @property
    def passing_length(self) -> int:
        """l_p, key/value pairs per KV head that a block passes on at most; 0 where nothing is passed."""
        return self.method.passing_length

    @property
    def exact(self) -> bool:
        """True if the result is that of full attention, as with one block."""
        return self.method.is_exact(self) and self.going_on == self.document

    @property
    def going_on(self) -> int:
        """Tokens of the document that go through all layers."""
        return self.document if self.propagation is None else self.propagation.rows(self.document)

    def propagated(self) -> dict[str, int | float | None] | None:
        """The propagation as results tell it: the layer, the document's rows that go on, and their share."""
        if self.propagation is None:
            return None
        return {"layer": self.propagation.layer, "rows": self.going_on, "share": self.going_on / self.document}

    @property
    def above(self) -> Plan:
        """Who attends the rows that go on, above the layer of propagation, as if they were the whole document.

        Exactly, dealt evenly to the ranks.
        """
        method = Ring() if self.ranks > 1 else Full()
        return Plan.of_method(method, self.prefix, self.going_on, self.query, self.ranks)

    @property
    def query_start(self) -> int:
        """True position of the query's first token."""
        return self.prefix + self.document

    @property
    def total(self) -> int:
        """Tokens of the whole prompt."""
        return self.prefix + self.document + self.query

    @property
    def anchored(self) -> int:
        """True positions [0, anchored) are in the anchor: they are never selected for passing."""
        return self.method.anchored(self)

    def anchor_tokens(self, prefix: Tokens, document: Tokens, query: Tokens) -> Tokens:
        """Tokens at positions 0, 1, ... for the anchor, which takes the first ``anchor_length``."""
        return self.method.anchor_tokens(self, prefix, document, query)

    def block(self, index: int) -> Block:
        """Block ``index`` (0-based). Slices are those of ``numpy.array_split``: the first n mod H are one longer."""
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of {self.blocks}")
        length, longer = divmod(self.document, self.blocks)
        start = self.prefix + index * length + min(index, longer)
        stop = start + length + (index < longer)
        # Snake order (Spava, arXiv 2601.21444): late blocks attend to more passed pairs, so each turn over the ranks
        # runs against the one before it and every rank gets early blocks together with late ones.
        turn, place = divmod(index, self.ranks)
        rank = place if turn % 2 == 0 else self.ranks - 1 - place
        return Block(index, 0 if index == 0 else start, stop, rank, index * self.rounds // self.blocks)

    def all_blocks(self) -> Iterator[Block]:
        """The blocks of all ranks, in document order."""
        return (self.block(index) for index in range(self.blocks))

    def owned(self, rank: int) -> Iterator[Block]:
        """The blocks of a rank, in document order."""
        for first in range(0, self.blocks, self.ranks):
            forward = first // self.ranks % 2 == 0
            index = first + (rank if forward else self.ranks - 1 - rank)
            if index < self.blocks:
                yield self.block(index)

    def selectable(self, block: Block) -> int:
        """Number of tokens of a block that may be selected: those not in the anchor (its last ones)."""
        return block.stop - min(max(block.start, self.anchored), block.stop)

    def passed(self, index: int) -> int:
        """Number of pairs per KV head that block ``index`` passes on; 0 for the last block."""
        return self.method.passed(self, index)

    @property
    def competing(self) -> int | None:
        """Passed pairs per KV head that a block sees where not all fit into the budget; None where they do."""
        offered = self.anchor_length + sum(map(self.passed, range(self.blocks)))
        return self.method.passing_budget if offered > max(self.contexts()) else None

    def contexts(self) -> tuple[int, ...]:
        """For every block, the number of pairs beside its own that its rows attend to."""
        return _contexts(self)

    def rows_by_rank(self) -> list[int]:
        """The number of the document's rows on every rank, prefix included."""
        return [sum(map(len, self.owned(rank))) for rank in range(self.ranks)]

    # -- the rows of a rank ------------------------------------------------------------------------------------------

    @property
    def tail_rank(self) -> int:
        """The rank whose cache holds the query's and the generated tokens' keys and values."""
        return self.ranks - 1

    def anchor_share(self, rank: int) -> tuple[int, int]:
        """Positions [start, stop) of the anchor whose rows this rank computes."""
        return self.method.anchor_share(self, rank)

    def spans(self, rank: int, round: int = 0) -> tuple[Span, ...]:
        """The rows of a rank in one round: its share of the anchor (first round), its blocks, then the query.

        The query's rows run in every round: they choose the pairs that its blocks pass on, given the text read so far.
        """
        spans: list[Span] = []
        row = 0

        def add(kind: Kind, start: int, stop: int, block: int = -1) -> None:
            nonlocal row
            spans.append(Span(kind, start, stop, row, block))
            row += stop - start

        if round == 0 and self.anchor_length:
            add(Kind.ANCHOR, *self.anchor_share(rank))
        for block in self.owned(rank):
            if block.round == round:
                add(Kind.BLOCK, block.start, block.stop, block.index)
        add(Kind.QUERY, self.query_start, self.total)
        return tuple(spans)

    def itinerary(self, rank: int, round: int = 0) -> Itinerary:
        """The rows of a rank in one round."""
        return Itinerary(self, rank, round, self.spans(rank, round))

    def document_spans(self, rank: int) -> Iterator[Span]:
        """The spans of anchor and blocks of a rank, in all rounds."""
        for round in range(self.rounds):
            yield from (span for span in self.spans(rank, round) if span.kind is not Kind.QUERY)

    def to_dict(self) -> dict[str, int]:
        """The plan's numbers, as the command line prints them, and the strategy's other options that are set."""
        numbers = {
            "blocks": self.blocks,
            "ranks": self.ranks,
            "rounds": self.rounds,
            "anchor_length": self.anchor_length,
            "passing_length": self.passing_length,
            "document_tokens": self.document,
            "query_tokens": self.query,
        }
        others = {name: getattr(self.method, name) for name in options_of(self.method) if name not in numbers}
        return numbers | {name: value for name, value in others.items() if value is not False and value is not None}


@lru_cache(maxsize=8)  # asked for by every rank of a plan
def _contexts(plan: Plan) -> tuple[int, ...]:
    return tuple(plan.method.contexts(plan))
