"""Variable tracking: a value is given to a variable, and other variables are set from it, one after the other."""

from __future__ import annotations

from random import Random

from .filler import FILLERS, spaced
from .lexicon import TITLES
from .material import Encoder, Fact, Material, Question, number, pick

VARIABLES = spaced(TITLES)
QUESTIONS = ("Which variables hold the value", "Which variables are equal to", "Which variables have the value")
STATEMENT_SIZE = 8
"""About the number of tokens of a statement."""


def chains(rng: Random, lengths: list[int]) -> Material:
    """Chains of the given numbers of names, one question each; the names are distinct over all chains."""
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
    """`VAR a = 123456`, then `VAR b = VAR a` and so on; which variables hold the value: the names in order."""
    fitting = room * 9 // 10 // (STATEMENT_SIZE * (hops + 1)) - 1
    material = chains(rng, [hops + 1] * (1 + max(0, min(distractor_chains, fitting))))
    material.questions = material.questions[:1]
    material.filler = haystack or pick(rng, list(FILLERS))
    return material
