"""Needles: sentences that assign a six-digit number to a key (adjective and noun), hidden in filler."""

from __future__ import annotations

from random import Random

from .filler import FILLERS, Sentence, spaced
from .lexicon import ADJECTIVES, NOUNS
from .material import Encoder, Fact, Material, Pair, Question, TaskError, number, pick

KEY_ADJECTIVES = spaced(ADJECTIVES)
KEY_NOUNS = spaced(NOUNS)
STATEMENTS = (
    "The number of the{adj}{noun} is{value}.",
    "Remember that the{adj}{noun} has the number{value}.",
    "The{adj}{noun} was given the number{value}.",
    "For the{adj}{noun} the register shows{value}.",
    "Anyone who asks for the{adj}{noun} must say{value}.",
)
QUESTIONS = (
    "What is the number of the{adj}{noun}?",
    "Which number belongs to the{adj}{noun}?",
    "What number was given to the{adj}{noun}?",
    "What does the register show for the{adj}{noun}?",
)
SEVERAL = ("What are all the numbers of the{adj}{noun}?", "Which numbers belong to the{adj}{noun}?")
LIST_STARTS = ("What are the numbers of", "Which numbers belong to")
STATEMENT_SIZE = 16
"""Approximate number of tokens of a statement."""


def fill(template: str, key: Pair, value: str = "") -> Sentence:
    """A statement (with `value`) or question about a key, as segments."""
    head, _, tail = template.partition("{adj}{noun}")
    tail, marked, rest = tail.partition("{value}")
    start = [" " + head] if head else []
    return [*start, *key, tail, " " + value, rest] if marked else [*start, *key, tail]


def statement(rng: Random, key: Pair, value: str, forms: tuple[str, ...] = STATEMENTS) -> Sentence:
    """A needle, in one of `forms`."""
    return fill(pick(rng, forms), key, value)


def draw_keys(rng: Random, count: int, shared_words: bool = False) -> list[Pair]:
    """Distinct keys of two words, each word with a space before it.

    Unless `shared_words`, no two keys share a word, so that either word alone identifies a key.
    """
    if shared_words:
        pairs: dict[Pair, None] = {}
        while len(pairs) < count:
            pairs[(pick(rng, KEY_ADJECTIVES), pick(rng, KEY_NOUNS))] = None
        return list(pairs)
    most = min(len(KEY_ADJECTIVES), len(KEY_NOUNS))
    if count > most:
        raise TaskError(f"{count} keys were requested, but there are words for only {most}.")
    return list(zip(rng.sample(KEY_ADJECTIVES, count), rng.sample(KEY_NOUNS, count), strict=True))


def ask_one(rng: Random, key: Pair, value: str, task: str) -> Question:
    """A question for the only number of a key."""
    return Question(fill(pick(rng, QUESTIONS), key), (value,), task)


def ask_all(rng: Random, key: Pair, values: tuple[str, ...]) -> Question:
    """A question for all numbers of one key, answered in text order."""
    return Question(fill(pick(rng, SEVERAL), key), values, "multivalue")


def ask_list(rng: Random, keys: list[Pair], values: tuple[str, ...]) -> Question:
    """One question for the numbers of several keys, answered in the question's order."""
    segments = [" " + pick(rng, LIST_STARTS)]
    for index, key in enumerate(keys):
        segments += [" and the" if index and index == len(keys) - 1 else ", the" if index else " the", *key]
    return Question([*segments, "?"], values, "multiquery")


def distractors(rng: Random, count: int, room: int, used: int, keys: list[Pair]) -> list[Fact]:
    """Needles with other keys: `count`, or as many as fit next to `used` tokens into nine tenths of the room."""
    count = max(0, min(count, (room * 9 // 10 - used) // STATEMENT_SIZE, len(keys)))
    return [Fact(rng.random(), statement(rng, key, number(rng))) for key in keys[:count]]


def single(rng: Random, room: int, encoder: Encoder, haystack: str | None = None) -> Material:
    """One needle in filler; `haystack` names the kind of filler, random if None."""
    return multikey(rng, room, encoder, distractor_needles=0, haystack=haystack, task="single")


def multikey(
    rng: Random,
    room: int,
    encoder: Encoder,
    distractor_needles: int = 64,
    haystack: str | None = None,
    task: str = "multikey",
    shared_words: bool = False,
) -> Material:
    """One needle with a question, among `distractor_needles` with other keys (as many as fit).

    With `shared_words` keys may share their adjective or noun, which is harder.
    """
    key, *others = draw_keys(rng, 1 + distractor_needles, shared_words)
    value = number(rng)
    facts = [Fact(rng.random(), statement(rng, key, value))]
    facts += distractors(rng, distractor_needles, room, 2 * STATEMENT_SIZE, others)
    return Material(facts, [ask_one(rng, key, value, task)], filler=haystack or pick(rng, list(FILLERS)))


def multivalue(
    rng: Random,
    room: int,
    encoder: Encoder,
    values: int = 4,
    distractor_needles: int = 16,
    haystack: str | None = None,
) -> Material:
    """One key with several values at different places, among needles with other keys; the answer lists all values."""
    key, *others = draw_keys(rng, 1 + distractor_needles)
    numbers = tuple(dict.fromkeys(number(rng) for _ in range(values)))
    places = sorted(rng.random() for _ in numbers)
    facts = [Fact(place, statement(rng, key, value)) for place, value in zip(places, numbers, strict=True)]
    facts += distractors(rng, distractor_needles, room, values * STATEMENT_SIZE, others)
    return Material(facts, [ask_all(rng, key, numbers)], filler=haystack or pick(rng, list(FILLERS)))


def multiquery(
    rng: Random,
    room: int,
    encoder: Encoder,
    queries: int = 4,
    distractor_needles: int = 16,
    haystack: str | None = None,
) -> Material:
    """One question for the numbers of several keys, among needles with other keys."""
    keys = draw_keys(rng, queries + distractor_needles)
    values = tuple(number(rng) for _ in range(queries))
    asked = keys[:queries]
    facts = [Fact(rng.random(), statement(rng, key, value)) for key, value in zip(asked, values, strict=True)]
    facts += distractors(rng, distractor_needles, room, queries * STATEMENT_SIZE, keys[queries:])
    return Material(facts, [ask_list(rng, asked, values)], filler=haystack or pick(rng, list(FILLERS)))
