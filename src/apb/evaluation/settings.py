"""The readings that are compared: strategies with their options and compressors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..compressors import OPTIONS as COMPRESSOR_OPTIONS
from ..compressors import Compressor, compressor_named, make_compressor
from ..engine import Engine
from ..errors import InputError
from ..planning.methods import OPTIONS, Method, make_method
from ..planning.options import given, options_of


@dataclass(frozen=True)
class Setting:
    """One way to read the samples; ``compressor`` is None where the method passes nothing on."""

    method: Method
    compressor: Compressor | None = None

    @classmethod
    def of(cls, strategy: str | Method, compressor: str | Compressor | None = None, **options: Any) -> Setting:
        """A setting by names and options, as :class:`apb.Engine` takes them."""
        scoring = {name: options.pop(name) for name in COMPRESSOR_OPTIONS if name in options}
        method = make_method(strategy, options)
        return cls(method, make_compressor(compressor, scoring) if method.passes else None)

    @property
    def strategy(self) -> str:
        """Name of the method."""
        return self.method.name

    @property
    def asked(self) -> dict[str, Any]:
        """The options that were given, by name, heads apart: how records tell readings from each other."""
        scorer = self.compressor
        scoring = {} if scorer is None else {"compressor": scorer.name, **given(scorer)}
        scoring.pop("heads", None)
        return {"strategy": self.strategy, **given(self.method), **scoring}

    @property
    def heads(self) -> str | None:
        """The file of trained heads, where one scores."""
        path = getattr(self.compressor, "heads", None)
        return None if path is None else str(path)

    def engine(self, engine: Engine) -> Engine:
        """An engine of this setting on another's model; close it when done."""
        return Engine.from_model(
            engine.model, engine.tokenizer, fused=engine.fused, strategy=self.method, compressor=self.compressor
        )


def settings(strategies: Sequence[str], compressors: Sequence[str] = (), **options: Any) -> list[Setting]:
    """All combinations that differ: options count only where a strategy has them, compressors only where it passes.

    An option with several values (a list or tuple) is combined with the others. Heads count for the compressor
    "retaining", which is the default where they are given.
    """
    values = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in options.items()}
    values = {name: [each for each in several if each is not None] or [None] for name, several in values.items()}
    heads = values.pop("heads", [None])[0]
    names: list[str | None] = [*compressors] or [None]
    if heads and not any(map(_takes_heads, names)):
        raise InputError("Heads were given but no compressor uses them; add --compressor retaining.")
    found: dict[Setting, None] = {}
    for strategy, combination, name in product(strategies, product(*values.values()), names):
        chosen = dict(zip(values, combination, strict=True))
        method = make_method(strategy, {key: value for key, value in chosen.items() if key in OPTIONS})
        if not method.passes:
            found[Setting(method)] = None
            continue
        scoring = {key: value for key, value in chosen.items() if key not in OPTIONS}
        scorer = make_compressor(name, scoring | {"heads": heads if _takes_heads(name) else None})
        found[Setting(method, scorer)] = None
    return list(found)


def _takes_heads(compressor: str | None) -> bool:
    """True if a compressor has the option ``heads``, as the default one has where heads are given."""
    return compressor is None or "heads" in options_of(compressor_named(compressor))
