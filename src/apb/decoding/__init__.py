"""Decode methods: one file each, one line in :data:`DECODINGS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from ..errors import InputError
from ..planning.options import check, options_of, refuse_beside, union
from .base import Decoding, Reader, Shard, StoredReader
from .dense import Dense
from .indexed import Indexed
from .pages import Pages
from .retrieval import Retrieval
from .squeezed import Squeezed
from .streamed import Streamed

__all__ = [
    "DECODINGS",
    "EXACT",
    "OPTIONS",
    "Decoding",
    "Dense",
    "Indexed",
    "Pages",
    "Reader",
    "Retrieval",
    "Shard",
    "Squeezed",
    "StoredReader",
    "Streamed",
    "make_decoding",
    "make_decodings",
]

DECODINGS: dict[str, type[Decoding]] = {kind.name: kind for kind in (Dense, Pages, Squeezed, Streamed, Retrieval)}
# The default: every token attends to every key.
EXACT: Decoding = Dense()
# Every option of these methods by name.
OPTIONS = union(DECODINGS.values())


def make_decoding(decoding: str | Decoding = Dense.name, options: Mapping[str, Any] | None = None) -> Decoding:
    """A decode method by name; an instance is taken as it is.

    Args:
        decoding: a name of :data:`DECODINGS`, or an instance of any :class:`Decoding`.
        options: by name, of any method in the table; None stands for one that is not given.

    Raises:
        InputError: an unknown name, or options of other methods or beside an instance.
    """
    named = {name: value for name, value in (options or {}).items() if value is not None}
    if isinstance(decoding, Decoding):
        refuse_beside("decode method", decoding, named)
        return decoding
    if decoding not in DECODINGS:
        raise InputError(f"Unknown decode method {decoding!r}; choose one of {', '.join(sorted(DECODINGS))}.")
    kind = DECODINGS[decoding]
    check(OPTIONS, named)
    for name in named.keys() - options_of(kind).keys():
        raise InputError(f"The decode method {decoding!r} has no option {name!r}; leave it out.")
    return kind(**named)


def make_decodings(names: Sequence[str], options: Mapping[str, Any] | None = None) -> list[Decoding]:
    """Methods by name, each with those of the options that it has; several values of one (a list) make several methods.

    Raises:
        InputError: an unknown name, or an option that none of them has.
    """
    several = {name: value if isinstance(value, list) else [value] for name, value in (options or {}).items()}
    found: dict[Decoding, None] = {}
    unused = dict(several)
    for name in names:
        mine = {each: several[each] for each in options_of(DECODINGS.get(name, Dense)).keys() & several.keys()}
        unused = {each: value for each, value in unused.items() if each not in mine}
        for values in product(*mine.values()):
            found[make_decoding(name, dict(zip(mine, values, strict=True)))] = None
    for name, (first, *_) in unused.items():
        make_decoding(names[0], {name: first})
    return list(found)
