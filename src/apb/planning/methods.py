"""The strategies, as planning knows them: one line each; their attention lives in strategies/<name>.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ..errors import DoesNotFit, InputError


class Anchor(Enum):
    """What a strategy puts in front of its blocks."""

    NONE = "none"
    # prefix + query + first document tokens; its rows are shared out over the ranks
    WITH_QUERY = "with query"
    # the first tokens of block 0 at their own positions; every rank without block 0 computes all of it
    FIRST_BLOCK = "first block"


@dataclass(frozen=True)
class Method:
    """What planning has to know about a strategy."""

    exact: bool
    anchor: Anchor = Anchor.NONE
    # The number of blocks on so many ranks, where the method leaves no choice.
    blocks: Callable[[int], int] | None = None
    # Whether every row sees only some columns and diagonals.
    sparse: bool = False
    # Whether the query heads are scattered over the ranks.
    scatters_heads: bool = False
    # Whether blocks can be read round by round, with what later blocks see of earlier ones kept.
    in_rounds: bool = False
    # Whether attention is computed while keys and values are on their way.
    overlaps: bool = False

    @property
    def passes(self) -> bool:
        """Whether blocks pass pairs on: so where the anchor holds the query, and nowhere else."""
        return self.anchor is Anchor.WITH_QUERY


METHODS: dict[str, Method] = {
    "full": Method(exact=True, blocks=lambda ranks: 1),
    "apb": Method(exact=False, anchor=Anchor.WITH_QUERY, in_rounds=True, overlaps=True),
    "star": Method(exact=False, anchor=Anchor.FIRST_BLOCK, in_rounds=True),
    "ring": Method(exact=True, blocks=lambda ranks: 2 * ranks, overlaps=True),
    "ulysses": Method(exact=True, blocks=lambda ranks: ranks, scatters_heads=True),
    "minference": Method(exact=False, blocks=lambda ranks: 1, sparse=True),
}


def method_of(strategy: str) -> Method:
    """The planning traits of a strategy; InputError for an unknown name."""
    if strategy not in METHODS:
        raise InputError(f"Unknown strategy {strategy!r}; choose one of {', '.join(sorted(METHODS))}.")
    return METHODS[strategy]


def check_heads(strategy: str, heads: int, ranks: int) -> None:
    """DoesNotFit where a strategy scatters query heads over ranks that do not divide them."""
    if METHODS[strategy].scatters_heads and heads % ranks:
        raise DoesNotFit(
            f"The strategy {strategy!r} needs query heads that divide by the ranks, and {heads} do not divide by "
            f"{ranks}; use another number of ranks, or the strategy 'ring'."
        )


def kv_heads_of(first: int, count: int, group: int) -> list[int]:
    """KV heads that query heads [first, first + count) read, as an attention with grouped heads expects them."""
    per_head = [head // group for head in range(first, first + count)]
    kept = sorted(set(per_head))
    even = len(per_head) % len(kept) == 0
    regular = even and [kept[i // (count // len(kept))] for i in range(count)] == per_head
    return kept if regular else per_head
