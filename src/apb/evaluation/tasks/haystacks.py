"""Needles among other needles only, and needles of codes: kinds that the shipped model was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .filler import Filler, Sentence
from .lexicon import PLACES
from .material import Encoder, Fact, Material, Pair, Question, TaskError, number, pick
from .needles import KEY_ADJECTIVES, KEY_NOUNS, QUESTIONS, ask_one, draw_keys, fill, multikey, statement

PLACED = (
    "The place of the{adj}{noun} is the{value}.",
    "Remember that the{adj}{noun} stands in the{value}.",
    "For the{adj}{noun} the register names the{value}.",
)
CODED = ("The record of {key} is {value}.", "For {key} the register shows {value}.", "Ask {key} and hear {value}.")
CODE_QUESTIONS = ("What is the record of {key}?", "What does the register show for {key}?")
# Beyond this share of all keys, rejection sampling of an unused one takes too long.
_MOST_KEYS = 0.9


def code(rng: Random) -> str:
    """32 hexadecimal digits in groups of 8, 4, 4, 4 and 12."""
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def coded(rng: Random, forms: tuple[str, ...], key: str, value: str = "") -> Sentence:
    """A statement or question about a code, as segments."""
    head, _, tail = pick(rng, forms).partition(" {key}")
    tail, _, end = tail.partition(" {value}")
    return [" " + head, " " + key, tail, " " + value, end] if value else [" " + head, " " + key, tail]


def keys_beside(taken: Pair, rng: Random) -> Callable[[], Pair]:
    """Function that draws two-word keys, without repetition and never `taken`; TaskError once they run out."""
    used = {taken}
    most = int(_MOST_KEYS * len(KEY_ADJECTIVES) * len(KEY_NOUNS))

    def draw() -> Pair:
        if len(used) >= most:
            raise TaskError(f"A text this long needs more keys than the {most:,} available; ask for a shorter one.")
        while True:
            key = (pick(rng, KEY_ADJECTIVES), pick(rng, KEY_NOUNS))
            if key not in used:
                used.add(key)
                return key

    return draw


def one_among(rng: Random, task: str, sentence: Callable[[Random, Pair], Sentence]) -> Material:
    """A needle with a number in a text of `sentence`s about other keys."""
    (key,) = draw_keys(rng, 1)
    value = number(rng)

    def filler(rng: Random) -> Callable[[], Sentence]:
        draw = keys_beside(key, rng)
        return lambda: sentence(rng, draw())

    return Material([Fact(rng.random(), statement(rng, key, value))], [ask_one(rng, key, value, task)], filler=filler)


def single_noise(rng: Random, room: int, encoder: Encoder) -> Material:
    """One needle in a few repeated sentences."""
    return multikey(rng, room, encoder, distractor_needles=0, haystack="noise", task="single_noise")


def single_prose(rng: Random, room: int, encoder: Encoder) -> Material:
    """One needle in running text."""
    return multikey(rng, room, encoder, distractor_needles=0, haystack="prose", task="single_prose")


def single_needles(rng: Random, room: int, encoder: Encoder) -> Material:
    """One needle with a number among needles with places: all have its form, none has another number."""
    return one_among(rng, "single_needles", lambda rng, key: fill(pick(rng, PLACED), key, pick(rng, PLACES)))


def single_code(rng: Random, room: int, encoder: Encoder) -> Material:
    """One needle whose value is a code, in running text."""
    (key,) = draw_keys(rng, 1)
    value = code(rng)
    question = Question(fill(pick(rng, QUESTIONS), key), (value,), "single_code")
    return Material([Fact(rng.random(), statement(rng, key, value))], [question], filler="prose")


def multikey_few(rng: Random, room: int, encoder: Encoder) -> Material:
    """One of four needles in running text."""
    return multikey(rng, room, encoder, distractor_needles=3, haystack="prose", task="multikey_few")


def multikey_all(rng: Random, room: int, encoder: Encoder) -> Material:
    """One needle in a text of needles only, whose keys share words."""
    return one_among(rng, "multikey_all", lambda rng, key: statement(rng, key, number(rng)))


def multikey_codes(rng: Random, room: int, encoder: Encoder) -> Material:
    """One needle in a text of needles only, with codes as keys and values."""
    key, value = code(rng), code(rng)

    def filler(rng: Random) -> Filler:
        return lambda: coded(rng, CODED, code(rng), code(rng))

    facts = [Fact(rng.random(), coded(rng, CODED, key, value))]
    return Material(facts, [Question(coded(rng, CODE_QUESTIONS, key), (value,), "multikey_codes")], filler=filler)
