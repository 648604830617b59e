"""The most tokens that a sample may have with its answer, and what documents lose for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..hf.loading import position_limit
from .items import Item


def check_length(length: int, config: Any) -> None:
    """Raise InputError if a model has fewer positions than a sample of this many tokens takes."""
    positions = position_limit(config)
    if positions is not None and length > positions:
        raise InputError(
            f"Samples of {length} tokens do not fit into the model's {positions} positions; ask for at most that."
        )


def needed_limit(asked: int | None, config: Any) -> int:
    """The tokens that were asked for, or the model's positions; InputError if neither is given."""
    limit = asked or position_limit(config)
    if limit is None:
        raise InputError("This model's configuration gives no number of positions; say how long samples are: --length.")
    return limit


def within(item: Item, positions: int | None) -> Item:
    """An item that has no limit yet with the model's positions as one, and listed under no more than those."""
    if item.limit is not None or positions is None:
        return item
    return replace(item, limit=positions, length=min(item.length, positions))


def cut_note(cuts: Sequence[int], samples: int) -> str:
    """What to say of a run in which some documents lost these numbers of tokens."""
    return (
        f"{len(cuts):,} of {samples:,} documents lost their middle, at most {max(cuts):,} tokens, to fit with question "
        "and answer into the length asked for or the model's positions"
    )
