"""Groups of parameters: a command takes several as one argument, and typer sees each of them.

A group is a frozen dataclass whose fields are parameters, groups, or dictionaries marked as :class:`Derived`, which
stand for options that are declared elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import wraps
from types import GenericAlias
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ..errors import InputError
from ..planning.options import Share


@dataclass(frozen=True, eq=False)
class Derived:
    """Marks a dictionary, ``Annotated[dict[str, Any], Derived(options)]``: the values given for these options, by name.

    Attributes:
        options: by name; each becomes a parameter of the command, with the help text of its field.
        repeatable: names of options that may be given several times; their values are lists.
    """

    options: Mapping[str, Field[Any]]
    repeatable: tuple[str, ...] = ()

    def parameters(self) -> Iterator[inspect.Parameter]:
        """A parameter for each option, None (or no value, if repeatable) if it is not given."""
        for name, option in self.options.items():
            kind: Any = str if option.metadata["kind"] is Share else option.metadata["kind"]
            text = option.metadata["help"]
            if option.default not in (MISSING, None, "", False):
                text += f" By default {option.default}."
            if name in self.repeatable:
                kind, text = GenericAlias(list, kind), f"{text.rstrip('.')}; repeatable."
            declared = typer.Option(help=text, callback=_amount if option.metadata["kind"] is Share else None)
            yield _parameter(name, Annotated[kind | None, declared], None)

    def gathered(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were given; for the others some versions of typer pass None, some an empty list."""
        return {name: given[name] for name in self.options if given[name] is not None and given[name] != []}


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the groups that a command takes by their parameters, in the order of ``--help``."""
    hints = get_type_hints(command, include_extras=True)
    taken = inspect.signature(command).parameters
    flat = [each for name in taken for each in _flat(name, hints[name], taken[name].default)]

    @wraps(command)
    def call(**given: Any) -> None:
        command(**{name: _gathered(name, hints[name], given) for name in taken})

    call.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in flat}
    return call


def values(group: Any) -> dict[str, Any]:
    """A group's parameters by name, including those of nested groups and derived options that were given."""
    found: dict[str, Any] = {}
    for each in fields(group):
        value = getattr(group, each.name)
        found |= values(value) if is_dataclass(value) else value if isinstance(value, dict) else {each.name: value}
    return found


def _flat(name: str, hint: Any, default: Any) -> Iterator[inspect.Parameter]:
    derived = _derived(hint)
    if derived is not None:
        yield from derived.parameters()
    elif is_dataclass(hint):
        for each, inner in _hints(hint):
            yield from _flat(each.name, inner, inspect.Parameter.empty if each.default is MISSING else each.default)
    else:
        yield _parameter(name, hint, default)


def _gathered(name: str, hint: Any, given: Mapping[str, Any]) -> Any:
    derived = _derived(hint)
    if derived is not None:
        return derived.gathered(given)
    if is_dataclass(hint):
        make: Any = hint
        return make(**{each.name: _gathered(each.name, inner, given) for each, inner in _hints(hint)})
    return given[name]


def _hints(group: Any) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(group, include_extras=True)
    return [(each, hints[each.name]) for each in fields(group)]


def _derived(hint: Any) -> Derived | None:
    return next((each for each in get_args(hint)[1:] if isinstance(each, Derived)), None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _amount(parameter: typer.CallbackParam, text: str | None) -> int | float | None:
    """A number of tokens ("1000"), or a share of the prompt ("0.1", "10%"), as the plan takes them."""
    if text is None:
        return None
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise InputError(
            f"{parameter.opts[0]} takes a number such as 1000 or a share such as 0.1, not {text!r}."
        ) from error
