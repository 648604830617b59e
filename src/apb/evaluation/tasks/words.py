"""Counting: the most common words of a long list, and of a text of code words with Zipf frequencies."""

from __future__ import annotations

from random import Random

from .filler import Sentence, spaced
from .lexicon import WORDS
from .material import Encoder, Material, Question, TaskError

CODES = spaced(WORDS)
COMMON_QUESTION = "Which ten words are the most common in the list?"
FREQUENT_QUESTION = "Which three code words are the most frequent in the text?"


def shuffled(rng: Random, counts: dict[str, int]) -> Sentence:
    """Every word `counts[word]` times, in random order, as segments of a document."""
    words = [word for word, count in counts.items() for _ in range(count)]
    rng.shuffle(words)
    return [words[0].lstrip(), *words[1:]] if words else []


def mean_size(encoder: Encoder) -> float:
    """Mean number of tokens of a code word."""
    return encoder.count(CODES) / len(CODES)


def trim(counts: dict[str, int], free: list[str], room: int, encoder: Encoder) -> None:
    """Lower the counts of the words in `free`, one of each in turn, until the text fits into `room` tokens.

    Two tokens are reserved for the first word. TaskError if it does not fit without any of them.
    """
    sizes = {word: len(encoder.ids(word)) for word in counts}
    total = sum(sizes[word] * count for word, count in counts.items()) + 2
    while total > room:
        left = [word for word in reversed(free) if counts[word]]
        if not left:
            raise TaskError(f"A list of words does not fit into {room} tokens.")
        for word in left:
            if total > room:
                counts[word] -= 1
                total -= sizes[word]


def common_words(
    rng: Random, room: int, encoder: Encoder, common: int = 10, ratio: int = 10, distinct: int = 400
) -> Material:
    """A long list of words in random order, in which `common` words are `ratio` times as frequent as the others."""
    slots = room / mean_size(encoder)
    # A short list has fewer distinct words; the number of the others is then chosen to fill the list.
    planned = max(common, min(distinct, int(slots / 3) - common * ratio))
    often = max(1, int(slots / (common * ratio + planned)))
    others = max(common, min(int(slots / often) - common * ratio, len(CODES) - common))
    words = rng.sample(CODES, common + others)
    counts = dict.fromkeys(words[:common], often * ratio) | dict.fromkeys(words[common:], often)
    for index in range(max(0, int(slots) - sum(counts.values()))):
        counts[words[common + index % others]] += 1
    trim(counts, words[common:], room, encoder)
    body = shuffled(rng, counts)
    order = {word: index for index, word in reversed(list(enumerate([" " + body[0], *body[1:]])))}
    answers = tuple(word.strip() for word in sorted(words[:common], key=lambda word: order[word]))
    return Material(questions=[Question([" " + COMMON_QUESTION], answers, "common_words")], body=body)


def frequent_words(
    rng: Random, room: int, encoder: Encoder, answers: int = 3, distinct: int = 300, alpha: float = 1.5
) -> Material:
    """A text of code words with frequencies rank ** -alpha; the answer lists the `answers` most frequent, in order."""
    slots = room / mean_size(encoder)
    words = rng.sample(CODES, min(distinct, max(answers + 4, int(slots / 6))))
    weights = [(rank + 1) ** -alpha for rank in range(len(words))]
    sizes = [len(encoder.ids(word)) for word in words]
    scale = room / sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    counts = {word: max(1, int(weight * scale)) for word, weight in zip(words, weights, strict=True)}
    trim(counts, words[answers + 1 :], room, encoder)
    counts = dict(sorted(counts.items(), key=lambda item: -item[1]))
    left = room - 2 - encoder.count(shuffled(rng, counts))
    for word in words[answers + 2 :]:
        if left > 20 and counts[word] + 20 < counts[words[answers - 1]]:
            counts[word] += 1
            left -= len(encoder.ids(word))
    body = shuffled(rng, counts)
    named = tuple(word.strip() for word in words[:answers])
    return Material(questions=[Question([" " + FREQUENT_QUESTION], named, "frequent_words")], body=body)
