"""Who computes which rows, at which positions: pure Python arithmetic, decided before anything runs.

Nothing here allocates memory in proportion to the document: a plan for ten million tokens is as small as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from . import sizes
from .methods import METHODS, Anchor, Method, method_of

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


class Kind(Enum):
    """What the rows of a span are."""

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
        """First of these rows in the rank's row order, and the one after the last."""
        return self.row, self.row + len(self)

    @property
    def rows(self) -> slice:
        """Where these rows are in the rank's row order."""
        return slice(*self.bounds)


@dataclass(frozen=True)
class Plan:
    """An immutable plan of one prefill. Make one with :meth:`build`.

    Attributes:
        strategy: name of the method.
        prefix, document, query: lengths in tokens.
        blocks: number of blocks H that the document is cut into.
        ranks: number of processes, each with one device.
        rounds: forward passes that the blocks are spread over (consecutive blocks share a round).
        anchor_length: l_a, tokens of the anchor; 0 where there is none.
        passing_length: l_p, key/value pairs per KV head that a block passes on; 0 where nothing is passed.
        vertical_size, slash_size: columns and diagonals that each head sees in a sparse method; 0 in the others.
        reason: why this strategy was chosen, where it was not the user who chose.
    """

    strategy: str
    prefix: int
    document: int
    query: int
    blocks: int
    ranks: int
    rounds: int
    anchor_length: int
    passing_length: int
    vertical_size: int = 0
    slash_size: int = 0
    reason: str | None = None

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
        strategy: str = "apb",
        rounds: int = 1,
        vertical_size: int | float | None = None,
        slash_size: int | float | None = None,
    ) -> Plan:
        """A plan with what is left open filled in as in the paper's table 8; raises InputError where it cannot be.

        Exact methods choose their blocks themselves, and have neither anchor nor passing blocks. With one block there
        is nothing to approximate: anchor and passing lengths are then 0 whatever was asked.
        """
        method = method_of(strategy)
        sizes.check(
            prefix=prefix,
            document=document,
            query=query,
            blocks=blocks,
            ranks=ranks,
            rounds=rounds,
            anchor_length=anchor_length,
            passing_length=passing_length,
        )
        blocks = sizes.blocks(strategy, document, ranks, blocks)
        sizes.check_rounds(strategy, rounds, blocks)
        if method.sparse:
            total = prefix + document + query
            vertical = sizes.budget("vertical size", vertical_size, sizes.DEFAULT_VERTICAL, total)
            slash = sizes.budget("slash size", slash_size, sizes.DEFAULT_SLASH, total)
            return cls(strategy, prefix, document, query, 1, ranks, 1, 0, 0, vertical, slash)
        if blocks == 1:
            return cls(strategy, prefix, document, query, 1, ranks, 1, 0, 0)
        anchor_length = sizes.anchor(method, prefix, document, query, blocks, anchor_length)
        passing_length = sizes.passing(method, document, blocks, passing_length)
        return cls(strategy, prefix, document, query, blocks, ranks, rounds, anchor_length, passing_length)

    # -- the document ------------------------------------------------------------------------------------------------

    @property
    def method(self) -> Method:
        """What planning knows about the strategy."""
        return METHODS[self.strategy]

    @property
    def exact(self) -> bool:
        """Whether the result is that of full attention: so with one block, or with no column or diagonal left out."""
        method = self.method
        if method.sparse:
            return max(self.vertical_size, self.slash_size) >= self.total  # the query's columns take part in the choice
        return method.exact or self.blocks == 1

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
        """True positions [0, anchored) stand in the anchor: they are never selected for passing."""
        inserted = self.query if self.method.passes else 0
        return max(self.anchor_length - inserted, 0)

    def anchor_tokens(self, prefix: Tokens, document: Tokens, query: Tokens) -> Tokens:
        """The tokens at positions 0, 1, ... of the anchor, of which it has the first ``anchor_length``."""
        if self.method.passes:
            return prefix + query + document[: self.anchored]
        return prefix + document + query

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
        """How many tokens of a block may be selected: those that do not stand in the anchor (its last ones)."""
        return block.stop - min(max(block.start, self.anchored), block.stop)

    def passed(self, index: int) -> int:
        """How many pairs per KV head block ``index`` passes on; the last block has nobody to pass to."""
        if index == self.blocks - 1:
            return 0
        return min(self.passing_length, self.selectable(self.block(index)))

    def contexts(self) -> list[int]:
        """For every block, how many pairs beside its own its rows attend to.

        In an exact method all before it; else the anchor and what earlier blocks pass. Block 0 has none of it: it
        holds the prefix and the anchor's document tokens itself.
        """
        if self.method.exact:
            return [self.block(index).start for index in range(self.blocks)]
        before = accumulate(self.passed(index) for index in range(self.blocks - 1))
        return [0, *(self.anchor_length + pairs for pairs in before)]

    # -- the rows of a rank ------------------------------------------------------------------------------------------

    @property
    def tail_rank(self) -> int:
        """The rank whose cache holds the query's and the generated tokens' keys and values."""
        return self.ranks - 1

    def anchor_share(self, rank: int) -> tuple[int, int]:
        """Positions [start, stop) of the anchor whose rows this rank computes.

        With the query inside, the ranks' shares tile the anchor. Star computes it anew on every rank that has blocks
        but not block 0, whose own rows they are.
        """
        if self.method.anchor is Anchor.FIRST_BLOCK:
            blocks = [block.index for block in self.owned(rank)]
            return 0, self.anchor_length if blocks and blocks[0] != 0 else 0
        return self.anchor_length * rank // self.ranks, self.anchor_length * (rank + 1) // self.ranks

    def spans(self, rank: int, round: int = 0) -> tuple[Span, ...]:
        """The rows of a rank in one round: its share of the anchor (first round), its blocks, then the query.

        The query's rows go along in every round: they choose what its blocks pass on, by what was read so far.
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

    def to_dict(self) -> dict[str, int]:
        """The plan's numbers, as the command line prints them; the budgets of a sparse method only where they count."""
        numbers = {
            "blocks": self.blocks,
            "ranks": self.ranks,
            "rounds": self.rounds,
            "anchor_length": self.anchor_length,
            "passing_length": self.passing_length,
            "document_tokens": self.document,
            "query_tokens": self.query,
        }
        if self.method.sparse:
            numbers |= {"vertical_size": self.vertical_size, "slash_size": self.slash_size}
        return numbers
