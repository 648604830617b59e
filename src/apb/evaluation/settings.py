"""The readings that are compared: strategies with their options and compressors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..compressors import COMPRESSORS, Compressor, compressor_named, make_compressor
from ..compressors import OPTIONS as COMPRESSOR_OPTIONS
from ..decoding import EXACT, Decoding
from ..engine import Engine
from ..errors import InputError
from ..planning.methods import OPTIONS, Method, make_method
from ..planning.options import check, given, options_of
from ..planning.propagation import Propagation

ASK_AFTER = ("this", "other", "none", "typical")
"""A document that stays read may have been read for the question that is asked, for another one, for none, or for
questions that stand for those to come."""


@dataclass(frozen=True)
class Setting:
    """One way to read and answer the samples.

    Attributes:
        method: the strategy.
        compressor: None where the method passes nothing on.
        decoding: the decode method.
        ask_after: None to read question and document at once; or one of :data:`ASK_AFTER`: for which question the
            document is read before its own is asked.
        propagation: which rows go on from a middle layer; None: all.
    """

    method: Method
    compressor: Compressor | None = None
    decoding: Decoding = EXACT
    ask_after: str | None = None
    propagation: Propagation | None = None

    @classmethod
    def of(cls, strategy: str | Method, compressor: str | Compressor | None = None, **options: Any) -> Setting:
        """A setting by names and options of strategy and compressor, as :class:`apb.Engine` takes them."""
        scoring = {name: options.pop(name) for name in COMPRESSOR_OPTIONS if name in options}
        method = make_method(strategy, options)
        return cls(method, make_compressor(compressor, scoring) if method.passes else None)

    @property
    def strategy(self) -> str:
        """Name of the method."""
        return self.method.name

    @property
    def asked(self) -> dict[str, Any]:
        """The given options by name, without heads; records distinguish readings by them.

        An option of the compressor or decode method whose name is taken is prefixed with its owner's name.
        """
        asked = {"strategy": self.strategy, **given(self.method)}
        decoding = None if self.decoding == EXACT else self.decoding
        for part, owner in (("compressor", self.compressor), ("decode", decoding)):
            if owner is not None:
                asked[part] = owner.name
                options = {name: value for name, value in given(owner).items() if name != "heads"}
                asked |= {f"{owner.name} {name}" if name in asked else name: options[name] for name in options}
        asked |= {} if self.propagation is None else {"propagate": str(self.propagation)}
        return asked | ({} if self.ask_after is None else {"ask_after": self.ask_after})

    @property
    def reading(self) -> Setting:
        """The same with exact decode: settings of one reading answer over what is read once."""
        return replace(self, decoding=EXACT)

    @property
    def heads(self) -> str | None:
        """The file of trained heads, if a compressor uses one."""
        path = getattr(self.compressor, "heads", None)
        return None if path is None else str(path)

    def engine(self, engine: Engine) -> Engine:
        """An engine of this setting on another's model; close it when done."""
        options = {"compressor": self.compressor, "decoding": self.decoding, "propagation": self.propagation}
        return engine.reading_by(self.method, **options)


def settings(
    strategies: Sequence[str],
    compressors: Sequence[str] = (),
    decodings: Sequence[Decoding] = (EXACT,),
    propagations: Sequence[Propagation | None] = (None,),
    **options: Any,
) -> list[Setting]:
    """All distinct combinations: options apply to strategies that have them, compressors to those that pass pairs.

    An option with several values (a list or tuple) is combined with the others. Options of compressors apply to those
    that have them, if several are named. Settings that differ in the decode method alone stand side by side.
    """
    values = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in options.items()}
    values = {name: [each for each in several if each is not None] or [None] for name, several in values.items()}
    names: list[str | None] = [*compressors] or [None]
    _check_scoring({name: several for name, several in values.items() if name in COMPRESSOR_OPTIONS}, compressors)
    found: dict[Setting, None] = {}

    def beside(method: Method, scorer: Compressor | None) -> dict[Setting, None]:
        pairs = product(propagations, decodings)
        return {Setting(method, scorer, decoding, propagation=propagation): None for propagation, decoding in pairs}

    for strategy, combination, name in product(strategies, product(*values.values()), names):
        chosen = dict(zip(values, combination, strict=True))
        method = make_method(strategy, {key: value for key, value in chosen.items() if key in OPTIONS})
        if not method.passes:
            found |= beside(method, None)
            continue
        known = COMPRESSOR_OPTIONS if name is None else options_of(compressor_named(name))
        scorer = make_compressor(name, {key: value for key, value in chosen.items() if key in known})
        found |= beside(method, scorer)
    return list(found)


def _check_scoring(values: dict[str, list[Any]], compressors: Sequence[str]) -> None:
    """InputError for a value below its limit, and for an option that none of the compressors named has."""
    kinds = [compressor_named(name) for name in compressors]
    for name, several in values.items():
        for value in several:
            check(COMPRESSOR_OPTIONS, {name: value})
        if several != [None] and kinds and not any(name in options_of(kind) for kind in kinds):
            owner = next(kind.name for kind in COMPRESSORS.values() if name in options_of(kind))
            were, them = ("were", "them") if name.endswith("s") else ("was", "it")
            what = name.replace("_", " ").capitalize()
            raise InputError(f"{what} {were} given but no compressor uses {them}; add --compressor {owner}.")
