"""The planning side of the strategies that come with the package: one file each, one line in :data:`METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from ..options import check, options_of, refuse_beside, union
from .apb import APB
from .base import SHORTEST_WORTH_CUTTING, Blockwise, Method
from .full import Full
from .minference import MInference
from .ring import Ring
from .star import Star
from .ulysses import Ulysses, kv_heads_of

__all__ = [
    "APB",
    "METHODS",
    "OPTIONS",
    "SHORTEST_WORTH_CUTTING",
    "Blockwise",
    "Full",
    "MInference",
    "Method",
    "Ring",
    "Star",
    "Ulysses",
    "kv_heads_of",
    "make_method",
]

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (Full, APB, Star, Ring, Ulysses, MInference)}
# Every option of these methods by name.
OPTIONS = union(METHODS.values())


def make_method(strategy: str | Method, options: Mapping[str, Any], compared: bool = False) -> Method:
    """A strategy by name, with those of the given options that it has; an instance is taken as it is.

    Options of other strategies are checked and left out, so that one set of options serves several strategies.

    Args:
        strategy: a name of :data:`METHODS`, or an instance of any :class:`Method`.
        options: by name; None stands for an option that is left open.
        compared: leave out options that are not meant for strategies compared side by side.

    Raises:
        InputError: an unknown strategy or option, a value below its limit, or options beside an instance.
    """
    named = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(named.keys() - OPTIONS.keys())
    if unknown:
        raise InputError(f"Unknown option {unknown[0]!r}; strategies have {', '.join(OPTIONS)}.")
    if isinstance(strategy, Method):
        refuse_beside("strategy", strategy, named)
        return strategy
    if strategy not in METHODS:
        raise InputError(f"Unknown strategy {strategy!r}; choose one of {', '.join(sorted(METHODS))}.")
    kind = METHODS[strategy]
    check(OPTIONS, named)
    known = {name: each for name, each in options_of(kind).items() if each.metadata["compared"] or not compared}
    return kind(**{name: value for name, value in named.items() if name in known})
