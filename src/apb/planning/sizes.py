"""How large the parts of a plan are: what may be asked for, and the paper's defaults for what is left open."""

from __future__ import annotations

import math

from ..errors import InputError, at_least
from .methods import METHODS, Anchor, Method, method_of

# Below this many document tokens approximate prefill does not pay (paper, section 4): one block, full attention.
SHORTEST_WORTH_CUTTING = 8192
# Defaults of the paper's table 8: anchor = block / 4, passing = block / 8, both capped; eight blocks.
DEFAULT_BLOCKS = 8
LARGEST_ANCHOR = 8192
LARGEST_PASSING = 8192
# Columns and diagonals of the vertical-slash pattern in MInference's published configurations.
DEFAULT_VERTICAL = 1000
DEFAULT_SLASH = 6096
# The least that each size of a request may be.
_LEAST = {
    "prefix": 0,
    "document": 1,
    "query": 1,
    "blocks": 1,
    "ranks": 1,
    "rounds": 1,
    "anchor length": 0,
    "passing length": 0,
}


def check(**asked: int | None) -> None:
    """InputError unless each size, by the argument's name in :meth:`apb.Plan.build`, is a whole number that may be."""
    for argument, size in asked.items():
        if size is not None:
            name = argument.replace("_", " ")
            at_least(name, size, _LEAST[name])


def blocks(strategy: str, document: int, ranks: int, asked: int | None) -> int:
    """The number of blocks that a document is cut into; exact methods choose it whatever was asked."""
    method = method_of(strategy)
    if method.blocks is not None:
        return method.blocks(ranks)
    if asked is None:
        asked = 1 if document < SHORTEST_WORTH_CUTTING else ranks * -(-DEFAULT_BLOCKS // ranks)
    if asked > document:
        raise InputError(
            f"{asked} blocks were asked for but the document has {document} tokens; use at most {document} blocks."
        )
    return asked


def check_rounds(strategy: str, rounds: int, blocks: int) -> None:
    """InputError where blocks cannot be read in so many rounds."""
    if rounds > 1 and not method_of(strategy).in_rounds:
        names = " or ".join(name for name, each in METHODS.items() if each.in_rounds)
        raise InputError(f"The strategy {strategy!r} reads in one round, not {rounds}; only {names} can take more.")
    if rounds > blocks:
        raise InputError(f"{rounds} rounds need at least as many blocks, but there are {blocks}; ask for fewer.")


def anchor(method: Method, prefix: int, document: int, query: int, blocks: int, asked: int | None) -> int:
    """The anchor's length in tokens, for several blocks; InputError where the one asked for cannot be."""
    if method.anchor is Anchor.NONE:
        return 0
    if method.anchor is Anchor.FIRST_BLOCK:
        first_block = prefix + -(-document // blocks)
        if asked is None:
            return first_block
        if asked > first_block:
            raise InputError(
                f"An anchor of {asked} tokens is longer than the first block, whose beginning it is "
                f"({first_block} tokens); ask for at most that."
            )
        return asked
    if asked is None:
        return max(min(document // blocks // 4, LARGEST_ANCHOR), prefix + query)
    if asked < prefix + query:
        raise InputError(
            f"An anchor of {asked} tokens does not hold the prefix ({prefix}) and the query ({query}); "
            f"make the anchor at least {prefix + query} tokens long or shorten the query."
        )
    return min(asked, prefix + document + query)


def passing(method: Method, document: int, blocks: int, asked: int | None) -> int:
    """Key/value pairs per KV head that a block passes on, 0 where the strategy passes nothing."""
    if not method.passes:
        return 0
    return min(document // blocks // 8, LARGEST_PASSING) if asked is None else asked


def budget(name: str, asked: int | float | None, default: int, total: int) -> int:
    """Columns or diagonals: as a number (int) or as a share of the prompt (float in (0, 1]), in tokens, at most all."""
    if isinstance(asked, float):
        if not 0 < asked <= 1:
            raise InputError(f"A {name} given as a share must be above 0 and at most 1, not {asked}.")
        asked = math.ceil(asked * total)
    elif asked is None:
        asked = default
    at_least(name, asked, 1)
    return min(asked, total)
