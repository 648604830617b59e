"""Options of strategies, compressors and decode methods: dataclass fields with their help text and limits.

The command line derives its options from these fields, so an option is declared once, where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any

from ..errors import InputError, at_least


def option(
    default: Any,
    help: str,
    *,
    least: int | None = None,
    kind: type = int,
    compared: bool = True,
    keyword: bool = False,
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: the value where the user gives none; None leaves the choice to the plan.
        help: one sentence for ``--help``.
        least: the smallest value allowed, for whole numbers.
        kind: the type on the command line: int, float, str, bool (a flag), or :class:`Share`.
        compared: False keeps it out of commands that give one set of options to several strategies side by side.
        keyword: True for a field that all subclasses have, which would otherwise come before their own.
    """
    metadata = {"help": help, "least": least, "kind": kind, "compared": compared}
    return field(default=default, metadata=metadata, kw_only=keyword)


class Share:
    """The kind of an option that takes a number of tokens (int) or a share of all tokens (float in (0, 1])."""


def options_of(owner: Any) -> dict[str, Field[Any]]:
    """The options of a dataclass or of an instance of one, by name."""
    return {each.name: each for each in fields(owner) if "help" in each.metadata}


def given(owner: Any) -> dict[str, Any]:
    """The options of an instance that differ from their defaults, and its other fields that are numbers or strings."""
    options = options_of(owner)
    values = {each.name: (getattr(owner, each.name), each.default) for each in fields(owner)}
    return {
        name: value
        for name, (value, default) in values.items()
        if (name in options or isinstance(value, (int, float, str))) and (default is MISSING or value != default)
    }


def check(options: Mapping[str, Field[Any]], values: Mapping[str, Any]) -> None:
    """InputError if a value is below its option's least; None and options without a limit pass."""
    for name, value in values.items():
        least = options[name].metadata["least"]
        if value is not None and least is not None:
            at_least(name.replace("_", " "), value, least)


class Checked:
    """Base of frozen dataclasses of options: a value below its least is refused when an object is made."""

    def __post_init__(self) -> None:
        options = options_of(self)
        check(options, {name: getattr(self, name) for name in options})


def refuse_beside(what: str, owner: object, named: Iterable[str]) -> None:
    """InputError if options were given by name beside an object, which has its own; ``what``: the kind of object."""
    for name in named:
        raise InputError(
            f"The option {name!r} was given beside a {what} object; give it to {type(owner).__name__}(...) itself."
        )


def union(owners: Iterable[Any]) -> dict[str, Field[Any]]:
    """The options of several dataclasses by name; of those that share a name, the first one's field."""
    found: dict[str, Field[Any]] = {}
    for owner in owners:
        found |= {name: each for name, each in options_of(owner).items() if name not in found}
    return found


def tokens_of(name: str, asked: int | float | None, default: int, total: int) -> int:
    """The number of tokens that a :class:`Share` option asks for, at most ``total``; InputError outside (0, 1]."""
    if isinstance(asked, float):
        if not 0 < asked <= 1:
            raise InputError(f"A {name} given as a share must be above 0 and at most 1, not {asked}.")
        asked = math.ceil(asked * total)
    elif asked is None:
        asked = default
    at_least(name, asked, 1)
    return min(asked, total)
