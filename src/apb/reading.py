"""How prompts are to be read: what users choose, checked once for the engine and for the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compressors import check_compressor, default_compressor
from .errors import InputError
from .planning.cost import Ceilings, Cost, predict
from .planning.fitting import check_memory, peak
from .planning.methods import METHODS
from .planning.plan import Plan
from .planning.shape import ModelShape
from .planning.sizes import SHORTEST_WORTH_CUTTING
from .prompt import Prompt

if TYPE_CHECKING:
    from .hardware import Hardware

AUTO = "auto"
# Where the hardware's ceilings are not known, candidates are compared by FLOPs, with 100 FLOPs to a byte sent.
_UNKNOWN_HARDWARE = Ceilings(linear=1e14, attention=1e14, link=1e12)


@dataclass(frozen=True)
class Reading:
    """The options of :class:`apb.Engine` that say how a prompt is read; None leaves a choice to the plan.

    Attributes:
        strategy: a name of methods.METHODS, or "auto": full attention for short documents, else what is predicted to be
            fastest of the exact strategies that fit into memory, or of all of them with ``approximate``.
        blocks, anchor_length, passing_length, vertical_size, slash_size: as in :meth:`apb.Plan.build`.
        rounds: forward passes that the blocks are read in; by default one, or as many as make it fit into memory.
        compressor: "query-edge", "query", "retaining", "recent" or "random"; by default "retaining" where heads are
            given, else "query-edge".
        heads: file of retaining heads.
        allow_extrapolation: go beyond the positions that the model was trained for.
        approximate: allow "auto" to choose a strategy that is not exact.
    """

    strategy: str = "apb"
    blocks: int | None = None
    rounds: int | None = None
    anchor_length: int | None = None
    passing_length: int | None = None
    vertical_size: int | float | None = None
    slash_size: int | float | None = None
    compressor: str | None = None
    heads: str | Path | None = None
    allow_extrapolation: bool = False
    approximate: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in (AUTO, *METHODS):
            raise InputError(
                f"Unknown strategy {self.strategy!r}; choose one of {', '.join(sorted(METHODS))}, or {AUTO}."
            )
        if self.strategy == AUTO and self.rounds not in (None, 1):
            raise InputError(f"The strategy {AUTO!r} finds the rounds itself; leave them out, or name another.")
        check_compressor(self.scorer, self.heads is not None)

    @property
    def scorer(self) -> str:
        """The compressor's name, with the default filled in."""
        return default_compressor(self.heads is not None) if self.compressor is None else self.compressor

    def plan(
        self,
        prompt: Prompt,
        ranks: int,
        config: Any,
        hardware: Hardware,
        new_tokens: int,
        tensor: int = 1,
        split: tuple[tuple[int, int], ...] = (),
    ) -> Plan:
        """The plan by which a prompt is read; InputError where it cannot be.

        Args:
            prompt: what to read.
            ranks: processes that read it together.
            config: the model's configuration.
            hardware: what every rank runs on.
            new_tokens: room that the answer needs.
            tensor: processes that share the weights of a rank.
            split: what each GPU of a rank holds, as in :class:`apb.planning.cost.ModelShape`.
        """
        from .hf.counting import model_shape  # transformers: not needed to make a Reading
        from .hf.loading import check_fit

        sizes = {"prefix": len(prompt.prefix), "document": len(prompt.document), "query": len(prompt.query)}
        shape = replace(model_shape(config).shared(tensor), split=split)
        if self.strategy == AUTO:
            plan = self._choose(sizes, ranks, shape, hardware)
        else:
            plan = self._build(self.strategy, sizes, ranks)
            if self.rounds is None:
                plan = _in_rounds(plan, shape, hardware, self.scorer)
        check_fit(config, plan, new_tokens, self.allow_extrapolation, tensor)
        check_memory(plan, shape, hardware, new_tokens, self.scorer)
        return plan

    def _build(self, strategy: str, sizes: dict[str, int], ranks: int) -> Plan:
        return Plan.build(
            **sizes,
            ranks=ranks,
            strategy=strategy,
            blocks=self.blocks,
            rounds=1 if self.rounds is None else self.rounds,
            anchor_length=self.anchor_length,
            passing_length=self.passing_length,
            vertical_size=self.vertical_size,
            slash_size=self.slash_size,
        )

    def _choose(self, sizes: dict[str, int], ranks: int, shape: ModelShape, hardware: Hardware) -> Plan:
        if sizes["document"] < SHORTEST_WORTH_CUTTING and ranks == 1:
            reason = f"the document has fewer than {SHORTEST_WORTH_CUTTING} tokens"
            return replace(self._build("full", sizes, ranks), reason=reason)
        names = [name for name, method in METHODS.items() if method.exact or self.approximate]
        plans = [
            _in_rounds(self._build(name, sizes, ranks), shape, hardware, self.scorer)
            for name in names
            if not METHODS[name].scatters_heads or shape.heads % ranks == 0
        ]
        costs = [(plan, predict(plan, shape, hardware.element_bytes, self.scorer)) for plan in plans]
        return fastest(costs, hardware)


def _in_rounds(plan: Plan, shape: ModelShape, hardware: Hardware, scorer: str) -> Plan:
    """The plan in as few rounds as fit into memory; as it is where it fits, or where rounds do not help it."""
    if plan.rounds > 1 or not plan.method.in_rounds or shape.cache_width:  # latents: see check_fit
        return plan
    for rounds in range(1, plan.blocks // plan.ranks + 1):
        candidate = replace(plan, rounds=rounds)
        if peak(predict(candidate, shape, hardware.element_bytes, scorer)) <= hardware.memory:
            return candidate
    return plan


def fastest(costs: list[tuple[Plan, Cost]], hardware: Hardware) -> Plan:
    """The plan with the least predicted time among those that fit into memory, with the reason written into it."""
    fitting = [(plan, cost) for plan, cost in costs if peak(cost) <= hardware.memory]
    if not fitting:
        plan, cost = min(costs, key=lambda item: peak(item[1]))
        unit = "rank" if cost.gpus == 1 else "GPU"
        raise InputError(
            f"No strategy fits: {plan.strategy} needs least, {peak(cost) / 2**30:.1f} GiB a {unit}, and a {unit} has "
            f"{hardware.memory / 2**30:.1f} GiB; use more ranks or a shorter document."
        )
    ceilings = hardware.ceilings or _UNKNOWN_HARDWARE
    plan, cost = min(fitting, key=lambda item: item[1].seconds(ceilings))
    names = ", ".join(candidate.strategy for candidate, _ in fitting)
    busiest = max(rank.flops for rank in cost.ranks)
    return replace(plan, reason=f"predicted fastest of {names} that fit: {busiest:.3g} FLOPs on the busiest rank")
