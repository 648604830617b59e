"""Compressors choose the key/value pairs that a block passes on: one file each, one line in :data:`COMPRESSORS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..planning.options import check, options_of, refuse_beside, union
from .base import BlockView, Compressor
from .query import Query
from .query_edge import QueryEdge
from .random import Random
from .recent import Recent
from .retaining import Head, Retaining

__all__ = [
    "COMPRESSORS",
    "OPTIONS",
    "BlockView",
    "Compressor",
    "Head",
    "Query",
    "QueryEdge",
    "Random",
    "Recent",
    "Retaining",
    "compressor_named",
    "make_compressor",
]

COMPRESSORS: dict[str, type[Compressor]] = {kind.name: kind for kind in (Query, QueryEdge, Random, Recent, Retaining)}
# Every option of these compressors by name.
OPTIONS = union(COMPRESSORS.values())


def compressor_named(name: str) -> type[Compressor]:
    """The class of a compressor; InputError for an unknown name."""
    if name not in COMPRESSORS:
        raise InputError(f"Unknown compressor {name!r}; choose one of {', '.join(sorted(COMPRESSORS))}.")
    return COMPRESSORS[name]


def make_compressor(
    compressor: str | Compressor | None = None, options: Mapping[str, Any] | None = None, seed: int = 0
) -> Compressor:
    """A compressor by name; an instance is taken as it is.

    Args:
        compressor: a name of :data:`COMPRESSORS`, or an instance of any :class:`Compressor`; None: "retaining" where
            heads are given, else "query-edge".
        options: by name, of any compressor in the table; None stands for one that is not given.
        seed: of "random".

    Raises:
        InputError: an unknown name; heads that are missing, or given to a compressor that does not use them; options
            of other compressors or beside an instance.
    """
    named = {name: value for name, value in (options or {}).items() if value is not None}
    if compressor is None:
        compressor = Retaining.name if "heads" in named else QueryEdge.name
    if isinstance(compressor, Compressor):
        refuse_beside("compressor", compressor, named)
        return compressor
    kind = compressor_named(compressor)
    if kind is Retaining and "heads" not in named:
        raise InputError(
            "The compressor 'retaining' scores with trained heads and none were given; "
            "name a file of heads, or use the compressor 'query-edge', which needs none."
        )
    if kind is not Retaining and "heads" in named:
        raise InputError(f"Heads were given but the compressor {compressor!r} does not use them; use 'retaining'.")
    check(OPTIONS, named)
    for name in named.keys() - options_of(kind).keys():
        raise InputError(f"The compressor {compressor!r} has no option {name!r}; leave it out.")
    return kind(seed) if kind is Random else kind(**named)
