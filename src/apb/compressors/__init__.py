"""Compressors choose the key/value pairs that a block passes on: one file per method, one line here."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from .base import BlockView, Compressor
from .query import Query
from .query_edge import QueryEdge
from .random import Random
from .recent import Recent
from .retaining import Head, Retaining

__all__ = [
    "COMPRESSORS",
    "BlockView",
    "Compressor",
    "Head",
    "check_compressor",
    "default_compressor",
    "make_compressor",
]

COMPRESSORS: dict[str, type[Compressor]] = {kind.name: kind for kind in (Query, QueryEdge, Random, Recent, Retaining)}


def default_compressor(has_heads: bool) -> str:
    """The compressor used if none is named: 'retaining' with heads, else 'query-edge'."""
    return Retaining.name if has_heads else QueryEdge.name


def check_compressor(name: str, has_heads: bool) -> None:
    """Raise InputError for an unknown name, missing heads, or heads that the compressor does not use."""
    if name not in COMPRESSORS:
        raise InputError(f"Unknown compressor {name!r}; choose one of {', '.join(sorted(COMPRESSORS))}.")
    if name == Retaining.name and not has_heads:
        raise InputError(
            "The compressor 'retaining' scores with trained heads, but none were given; "
            "name a file of heads, or use the compressor 'query-edge', which needs none."
        )
    if name != Retaining.name and has_heads:
        raise InputError(f"Heads were given but the compressor {name!r} does not use them; use 'retaining'.")


def make_compressor(name: str, heads: Sequence[Head] | None = None, seed: int = 0) -> Compressor:
    """The compressor of that name; ``heads`` (one per layer) are for 'retaining', ``seed`` is for 'random'."""
    check_compressor(name, heads is not None)
    if heads is not None:
        return Retaining(heads)
    return Random(seed) if name == Random.name else COMPRESSORS[name]()
