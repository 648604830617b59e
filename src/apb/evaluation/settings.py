"""The ways to read that are compared: strategies with their blocks and compressors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

from ..compressors import default_compressor
from ..engine import Engine
from ..errors import InputError
from ..planning.methods import method_of


@dataclass(frozen=True)
class Setting:
    """One way to read the samples, as the engine's options of the same names; None leaves a choice to the plan."""

    strategy: str
    blocks: int | None = None
    compressor: str | None = None
    anchor_length: int | None = None
    passing_length: int | None = None
    heads: str | None = None

    def engine(self, engine: Engine) -> Engine:
        """An engine of this setting on another's model; close it when done."""
        return Engine.from_model(engine.model, engine.tokenizer, fused=engine.fused, **asdict(self))


def settings(
    strategies: Sequence[str],
    blocks: Sequence[int],
    compressors: Sequence[str],
    anchor_length: int | None = None,
    passing_length: int | None = None,
    heads: str | None = None,
) -> list[Setting]:
    """All combinations that differ: blocks count only where a strategy cuts, compressors only where it passes.

    Heads count for the compressor "retaining", which is the default where they are given.
    """
    found: dict[Setting, None] = {}
    counts: list[int | None] = [*blocks] or [None]
    names = compressors or [default_compressor(heads is not None)]
    if heads and "retaining" not in names:
        raise InputError("Heads were given but no compressor uses them; add --compressor retaining.")
    for strategy, count, compressor in product(strategies, counts, names):
        method = method_of(strategy)
        cuts, passes = method.blocks is None, method.passes
        setting = Setting(
            strategy,
            count if cuts else None,
            compressor if passes else None,
            anchor_length if cuts else None,
            passing_length if passes else None,
            heads if passes and compressor == "retaining" else None,
        )
        found[setting] = None
    return list(found)
