"""The user's choice of how prompts are read, checked once for the engine and for the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .compressors import OPTIONS as COMPRESSOR_OPTIONS
from .compressors import Compressor, make_compressor
from .decoding import EXACT, Decoding, Dense, make_decoding
from .decoding import OPTIONS as DECODING_OPTIONS
from .errors import InputError, at_least
from .planning.cost import Ceilings, Cost
from .planning.fitting import check_memory, demand, peak, predict_on
from .planning.methods import METHODS, OPTIONS, SHORTEST_WORTH_CUTTING, Full, Method, make_method
from .planning.plan import Plan
from .planning.propagation import Propagation
from .planning.shape import ModelShape
from .prompt import Prompt

if TYPE_CHECKING:
    from .hardware import Hardware

AUTO = "auto"
# If the hardware's ceilings are not known, candidates are compared by FLOPs, with 100 FLOPs to a byte sent.
_UNKNOWN_HARDWARE = Ceilings(linear=1e14, attention=1e14, link=1e12)


@dataclass(frozen=True)
class Reading:
    """A strategy and a compressor, and the limits within which prompts are read. Make one with :meth:`of`.

    Attributes:
        methods: the strategies that may be used: one, or under "auto" those it chooses from.
        automatic: True under "auto": full attention for short documents, else the fastest method by prediction among
            those that fit into memory.
        compressor: chooses the pairs that blocks pass on.
        decoding: attends to the cache for new tokens.
        rounds: number of forward passes that read the blocks; None: one, or as many as it takes to fit into memory.
        allow_extrapolation: allow positions beyond those that the model was trained for.
        propagation: which rows go on from a middle layer; None: all.
    """

    methods: tuple[Method, ...]
    compressor: Compressor
    decoding: Decoding = EXACT
    automatic: bool = False
    rounds: int | None = None
    allow_extrapolation: bool = False
    propagation: Propagation | None = None

    @classmethod
    def of(
        cls,
        strategy: str | Method = "apb",
        *,
        compressor: str | Compressor | None = None,
        decoding: str | Decoding = Dense.name,
        rounds: int | None = None,
        allow_extrapolation: bool = False,
        approximate: bool = False,
        propagation: Propagation | str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Reading:
        """The reading given by an engine's options; raises InputError if they contradict each other.

        Args:
            strategy: a name of :data:`apb.methods.METHODS`, "auto", or an instance of :class:`apb.methods.Method`.
            compressor: a name of :data:`apb.compressors.COMPRESSORS` or an instance; by default "retaining" where
                ``heads`` are given, else "query-edge".
            decoding: a name of :data:`apb.decoding.DECODINGS` or an instance; "exact" attends to everything.
            rounds, allow_extrapolation: as the attributes.
            approximate: let "auto" choose a strategy that is not exact.
            propagation: as the attribute, or as ``--propagate`` takes it: "0.2", "0.2@14", "auto", "off".
            seed: of the compressor "random".
            options: of strategies (``blocks``, ``anchor_length``, ...), compressors (``heads``, ...) and decode methods
                that are given by name.
        """
        if rounds is not None:
            at_least("rounds", rounds, 1)
        scoring = {name: options.pop(name) for name in COMPRESSOR_OPTIONS if name in options}
        scorer = make_compressor(compressor, scoring, seed)
        decoder = make_decoding(decoding, {name: options.pop(name) for name in DECODING_OPTIONS if name in options})
        if isinstance(propagation, str):
            propagation = Propagation.parsed(propagation)
        elif not isinstance(propagation, (Propagation, type(None))):
            raise InputError(
                f"Propagation is apb.Propagation(layer, keep) or a text such as '0.2', not {propagation!r}."
            )
        if strategy != AUTO:
            chosen = _method(strategy, options)
            check_comparable(chosen, scorer)
            return cls((chosen,), scorer, decoder, False, rounds, allow_extrapolation, propagation)
        if rounds not in (None, 1):
            raise InputError(f"The strategy {AUTO!r} finds the rounds itself; leave them out, or name another.")
        found = tuple(make_method(kind.name, options) for kind in METHODS.values() if kind.exact or approximate)
        for each in found:
            check_comparable(each, scorer)
        return cls(found, scorer, decoder, True, rounds, allow_extrapolation, propagation)

    def arranged(self, prompt: Prompt) -> Prompt:
        """The prompt as it is read: with the question in front as well, if the strategy says so."""
        return prompt.question_first if self.methods[0].question_first else prompt

    def lengths(self, prompt: Prompt) -> tuple[int, int, int]:
        """(prefix, document, query) tokens of a prompt as it is read."""
        prompt = self.arranged(prompt)
        return len(prompt.prefix), len(prompt.document), len(prompt.query)

    def plan(
        self,
        lengths: tuple[int, int, int],
        ranks: int,
        config: Any,
        hardware: Hardware,
        new_tokens: int,
        tensor: int = 1,
        split: tuple[tuple[int, int], ...] = (),
        asked: bool = True,
    ) -> Plan:
        """The plan by which a prompt is read; InputError if there is none.

        Args:
            lengths: of the prompt, by :meth:`lengths`.
            ranks: processes that read it together.
            config: the model's configuration.
            hardware: what every rank runs on.
            new_tokens: room that the answer needs.
            tensor: processes that share the weights of a rank.
            split: what each GPU of a rank holds, as in :class:`apb.planning.shape.ModelShape`.
            asked: :attr:`apb.Prompt.asked`.
        """
        from .hf.counting import model_shape  # transformers: not needed to make a Reading
        from .hf.loading import check_fit

        shape = replace(model_shape(config).shared(tensor), split=split)
        plan = self.choose(lengths, ranks, shape, hardware, asked)
        check_fit(config, plan, new_tokens, self.allow_extrapolation, tensor)
        check_memory(plan, shape, hardware, new_tokens, self.compressor)
        return plan

    def demand(
        self, plan: Plan, config: Any, hardware: Hardware, new_tokens: int, tensor: int = 1
    ) -> tuple[int, int, int]:
        """See :func:`apb.planning.fitting.demand`, of a plan that :meth:`plan` has made."""
        from .hf.counting import model_shape

        return demand(plan, model_shape(config).shared(tensor), hardware, new_tokens, self.compressor)

    def choose(
        self, lengths: tuple[int, int, int], ranks: int, shape: ModelShape, hardware: Hardware, asked: bool = True
    ) -> Plan:
        """The plan for a prompt of (prefix, document, query) tokens, with the rounds and, if automatic, the method.

        ``asked``: False if the query stands for questions that are not known yet.
        """

        def planned(method: Method, rounds: int = 1) -> Plan:
            plan = Plan.of_method(method, *lengths, ranks, rounds)
            plan = plan if asked else Plan.of_method(method.unasked(plan), *lengths, ranks, rounds)
            return with_propagation(plan, self.propagation, shape)

        if not self.automatic:
            (method,) = self.methods
            plan = planned(method, 1 if self.rounds is None else self.rounds)
            return plan if self.rounds is not None else in_rounds(plan, shape, hardware, self.compressor)
        if lengths[1] < SHORTEST_WORTH_CUTTING and ranks == 1:
            reason = f"the document has fewer than {SHORTEST_WORTH_CUTTING} tokens"
            method = Full(question_first=self.methods[0].question_first)
            plan = with_propagation(Plan.of_method(method, *lengths), self.propagation, shape)
            return replace(plan, reason=reason)
        costs = []
        for method in self.methods:
            try:
                method.check_model(shape.heads, ranks)
            except InputError:
                continue
            plan = in_rounds(planned(method), shape, hardware, self.compressor)
            costs.append((plan, predict_on(hardware, plan, shape, self.compressor)))
        return fastest(costs, hardware)


def with_propagation(plan: Plan, propagation: Propagation | None, shape: ModelShape) -> Plan:
    """A plan with the layer of propagation filled in for a model; unchanged without propagation."""
    if propagation is None:
        return plan
    return replace(plan, propagation=propagation.settled(shape.reach or (None,) * shape.layers, plan.total))


def _method(strategy: str | Method, options: dict[str, Any]) -> Method:
    if not isinstance(strategy, (str, Method)):
        raise InputError(f"A strategy is a name or an object such as apb.methods.APB(blocks=8), not {strategy!r}.")
    if isinstance(strategy, str) and strategy not in METHODS:
        raise InputError(f"Unknown strategy {strategy!r}; choose one of {', '.join(sorted(METHODS))}, or {AUTO}.")
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        known = (*OPTIONS, *COMPRESSOR_OPTIONS, *DECODING_OPTIONS)
        raise TypeError(f"unexpected option {unknown[0]!r}; there are {', '.join(known)}")
    return make_method(strategy, options)


def check_comparable(method: Method, compressor: Compressor) -> None:
    """InputError if pairs of different blocks are to compete by scores that do not compare over blocks."""
    if method.passing_budget is not None and not compressor.comparable:
        raise InputError(
            f"A passing budget of {method.passing_budget:,} pairs needs scores that compare over blocks, and "
            f"the compressor {compressor.name!r} has none; leave the budget out, or use 'query-edge'."
        )


def in_rounds(plan: Plan, shape: ModelShape, hardware: Hardware, compressor: Compressor) -> Plan:
    """The plan in as few rounds as fit into memory; unchanged if it fits, or if rounds do not help."""
    if plan.rounds > 1 or not plan.method.in_rounds or shape.expands:  # latents: see check_fit
        return plan
    for rounds in range(1, plan.blocks // plan.ranks + 1):
        candidate = replace(plan, rounds=rounds)
        if peak(predict_on(hardware, candidate, shape, compressor)) <= hardware.memory:
            return candidate
    return plan


def fastest(costs: list[tuple[Plan, Cost]], hardware: Hardware) -> Plan:
    """The plan with the least predicted time among those that fit into memory, with its ``reason`` set."""
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
