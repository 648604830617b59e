"""Variable tracking: a variable gets a value, and further variables copy it in a chain."""

from __future__ import annotations

from random import Random

from .filler import FILLERS, spaced
from .lexicon import TITLES
from .material import Encoder, Fact, Material, Question, number, pick

VARIABLES = spaced(TITLES)
QUESTIONS = ("Which variables hold the value", "Which variables are equal to", "Which variables have the value")
STATEMENT_SIZE = 8
"""Approximate number of tokens of a statement."""


def chains(rng: Random, lengths: list[int]) -> Material:
    """Chains of `lengths` names each, with one question per chain; names are distinct across chains."""
    names = rng.sample(VARIABLES, sum(lengths))
    facts: list[Fact] = []
    questions: list[Question] = []
    for length in lengths:
        chain, names = names[:length], names[length:]
        value = " " + number(rng)
        places = sorted(rng.random() for _ in chain)
        facts.append(Fact(places[0], [" VAR", chain[0], " =", value, "."]))
        for place, name, source in zip(places[1:], chain[1:], chain, strict=False):
            facts.append(Fact(place, [" VAR", name, " =", " VAR", source, "."]))
        answers = tuple(name.strip() for name in chain)
        questions.append(Question([" " + pick(rng, QUESTIONS), value, "?"], answers, "variable_tracking"))
    return Material(facts, questions)


def variable_tracking(
    rng: Random,
    room: int,
    encoder: Encoder,
    hops: int = 4,
    distractor_chains: int = 3,
    haystack: str | None = None,
) -> Material:
    """`VAR a = 123456`, `VAR b = VAR a` and so on; the answer lists the variables with the value, in text order."""
    fitting = room * 9 // 10 // (STATEMENT_SIZE * (hops + 1)) - 1
    material = chains(rng, [hops + 1] * (1 + max(0, min(distractor_chains, fitting))))
    material.questions = material.questions[:1]
    material.filler = haystack or pick(rng, list(FILLERS))
    return material
