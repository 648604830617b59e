"""Check that a plan fits into memory, before anything runs; if not, find the nearest plan that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import DoesNotFit
from .cost import Cost, Scoring, predict
from .plan import Plan
from .shape import ModelShape

if TYPE_CHECKING:
    from ..hardware import Hardware

# The largest number of ranks that is suggested.
MOST_RANKS = 64


def check_memory(plan: Plan, shape: ModelShape, hardware: Hardware, new_tokens: int, compressor: Scoring) -> None:
    """DoesNotFit, with the numbers and the nearest plan that fits, if a plan is predicted to need too much."""
    answer = check_answer(plan.total, shape, hardware, new_tokens)
    room = hardware.memory - answer

    def fits(candidate: Plan) -> bool:
        return peak(predict_on(hardware, candidate, shape, compressor)) <= room

    if fits(plan):
        return
    ranks = predict_on(hardware, plan, shape, compressor).ranks
    most = max(ranks, key=lambda rank: rank.peak_bytes)
    where, unit = ("on a rank's fullest GPU", "GPU") if shape.split else ("a rank", "rank")
    raise DoesNotFit(
        f"Reading {plan.total:,} tokens with {plan.strategy!r} on {plan.ranks} rank{'s' * (plan.ranks > 1)} needs "
        f"{_gib(most.peak_bytes + answer)} {where} (weights {_gib(most.weight_bytes)}, cache "
        f"{_gib(most.cache_bytes + answer)}, activations {_gib(most.activation_bytes)}), "
        f"and a {unit} has {_gib(hardware.memory)}; {_way_out(plan, shape, fits)}."
    )


def check_answer(total: int, shape: ModelShape, hardware: Hardware, new_tokens: int) -> int:
    """Bytes that new tokens after ``total`` others take on a rank; DoesNotFit if it has no more than that in all."""
    layers, _ = shape.fullest(total + new_tokens)
    answer = new_tokens * layers * shape.layer_cache_row * hardware.element_bytes
    if answer >= hardware.memory:
        unit = "GPU" if shape.split else "rank"
        raise DoesNotFit(
            f"The cache of {new_tokens:,} new tokens alone takes {_gib(answer)}, and a {unit} has "
            f"{_gib(hardware.memory)}; ask for a shorter answer."
        )
    return answer


def demand(
    plan: Plan, shape: ModelShape, hardware: Hardware, new_tokens: int, compressor: Scoring
) -> tuple[int, int, int]:
    """Bytes beside the weights, of the rank that needs most: a plan's peak, its cache, and what is there.

    The first two include the cache of ``new_tokens``.
    """
    layers, _ = shape.fullest(plan.total + new_tokens)
    answer = new_tokens * layers * shape.layer_cache_row * hardware.element_bytes
    most = max(predict_on(hardware, plan, shape, compressor).ranks, key=lambda rank: rank.peak_bytes)
    beside = most.peak_bytes - most.weight_bytes + answer
    return beside, most.cache_bytes + answer, hardware.memory - most.weight_bytes


def predict_on(hardware: Hardware, plan: Plan, shape: ModelShape, compressor: Scoring) -> Cost:
    """The cost of a plan's prefill on the hardware of this run."""
    return predict(plan, shape, hardware.element_bytes, compressor, most_composed=hardware.most_composed)


def peak(cost: Cost) -> int:
    """Bytes of the rank that needs most."""
    return max(rank.peak_bytes for rank in cost.ranks)


def _way_out(plan: Plan, shape: ModelShape, fits: Callable[[Plan], bool]) -> str:
    """The nearest plan that fits, in words: more rounds, more ranks, or a shorter document."""
    for candidate in _alternatives(plan, shape):
        if fits(candidate):
            rounds = f" in {candidate.rounds} rounds" if candidate.rounds > 1 else ""
            ranks = f" on {candidate.ranks} ranks" if candidate.ranks > 1 else ""
            return f"what fits is {candidate.strategy!r} with {candidate.blocks} blocks{rounds}{ranks}"
    shorter = _shorter(plan, fits)
    if shorter:
        return f"what fits is a document of at most {shorter:,} tokens"
    return (
        f"the weights alone take {_gib(shape.parameters * 2)} in 16 bits: "
        "use --tensor-parallel, --gpus-per-rank, or a smaller model"
    )


def longest(plan: Plan, shape: ModelShape, hardware: Hardware, new_tokens: int, compressor: Scoring) -> int:
    """The longest document, in tokens, that is predicted to fit if it is read as this plan reads, up to its length."""

    def fits(candidate: Plan) -> bool:
        needed, _, room = demand(candidate, shape, hardware, new_tokens, compressor)
        return needed <= room

    return _shorter(plan, fits)


def _shorter(plan: Plan, fits: Callable[[Plan], bool]) -> int:
    """The longest document, within a hundredth, whose plan fits; 0 if none does."""
    shortest, longest = 0, plan.document
    while longest - shortest > max(shortest // 100, 1):
        middle = (shortest + longest) // 2
        if middle and fits(_resized(plan, middle)):
            shortest = middle
        else:
            longest = middle
    return shortest


def _alternatives(plan: Plan, shape: ModelShape) -> Iterator[Plan]:
    """Other plans for the same prompt, the nearest first."""
    if plan.method.in_rounds and not shape.expands:
        for rounds in range(plan.rounds + 1, plan.blocks // plan.ranks + 1):
            yield replace(plan, rounds=rounds)
    ranks = plan.ranks * 2
    while ranks <= MOST_RANKS:
        method = plan.method.on_ranks(ranks)
        if method.block_count(ranks) <= plan.document:
            wider = Plan.of_method(method, plan.prefix, plan.document, plan.query, ranks)
            yield replace(wider, propagation=plan.propagation)
        ranks *= 2


def _resized(plan: Plan, document: int) -> Plan:
    method = plan.method.for_document(document)
    shorter = Plan.of_method(method, plan.prefix, document, plan.query, plan.ranks)
    return replace(shorter, rounds=min(plan.rounds, shorter.blocks), propagation=plan.propagation)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
