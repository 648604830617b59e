"""The generated kinds of InfiniteBench (arXiv 2402.13718), reworded: pass key, digits, key-value pairs, numbers."""

from __future__ import annotations

from random import Random

from .filler import Sentence
from .haystacks import code
from .material import Encoder, Fact, Material, Question, TaskError, padding, pick

RANKS = ("largest", "second largest", "third largest", "smallest", "second smallest", "third smallest")


def passkey(rng: Random, room: int, encoder: Encoder) -> Material:
    """A five-digit number, given twice in one place of a repetitive text."""
    value = str(rng.randrange(10_000, 100_000))
    fact = [" The pass key is", " " + value, ".", " Keep it in mind:", " " + value, " is the pass key."]
    question = Question([" What is the pass key?"], (value,), "passkey")
    return Material([Fact(rng.random(), fact)], [question], filler="noise")


def number_string(rng: Random, room: int, encoder: Encoder) -> Material:
    """A ten-digit number, half of its digits repeats of their neighbours, given twice in a repetitive text."""
    digits = [pick(rng, "0123456789") for _ in range(5)]
    for _ in range(5):
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    value = "".join(digits)
    fact = [" The long number is", " " + value, ".", " Keep it in mind:", " " + value, " is the long number."]
    question = Question([" What is the long number?"], (value,), "number_string")
    return Material([Fact(rng.random(), fact)], [question], filler="noise")


def kv_retrieval(rng: Random, room: int, encoder: Encoder) -> Material:
    """One value of a JSON object whose keys and values are codes; words after it fill the rest of the room."""
    start, end = "{", "}"
    pairs: list[tuple[str, str]] = []
    left = room - encoder.count([start, end])
    while True:
        pair = (code(rng), code(rng))
        size = encoder.count([f'"{pair[0]}": "{pair[1]}", '])
        if size > left:
            break
        pairs.append(pair)
        left -= size
    if not pairs:
        raise TaskError(f"A pair of codes does not fit into {room} tokens.")
    key, value = pick(rng, pairs)
    body = [start, ", ".join(f'"{name}": "{given}"' for name, given in pairs), end, *padding(rng, left, encoder)]
    question = Question([f' Which value does the JSON object give to the key "{key}"?'], (value,), "kv_retrieval")
    return Material(questions=[question], body=body)


def extreme_number(rng: Random, room: int, encoder: Encoder) -> Material:
    """The largest, smallest, or second or third of either, in a long list of numbers; duplicates count once."""
    place, low, high = rng.randrange(len(RANKS)), rng.randrange(1000, 2000), rng.randrange(8000, 10_000)
    numbers: list[int] = []
    body: Sentence = []
    left = room - encoder.count(["."])
    while True:
        value = rng.randrange(low, high + 1)
        piece = [str(value)] if not body else [",", f" {value}"]
        size = encoder.count(piece)
        if size > left:
            break
        body += piece
        numbers.append(value)
        left -= size
    ranks = sorted(set(numbers))
    if len(ranks) < 3:
        raise TaskError(f"A list of three numbers does not fit into {room} tokens.")
    answer = ranks[place - 3] if place >= 3 else ranks[-1 - place]
    question = Question([f" What is the {RANKS[place]} number of the list?"], (str(answer),), "extreme_number")
    return Material(questions=[question], body=[*body, "."])
