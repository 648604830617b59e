"""Material of a task: facts placed in a document, questions about them, and the filler between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from ...errors import InputError
from .filler import Filler, Sentence, spaced
from .lexicon import NOUNS

Pair = tuple[str, str]


class Tokenizer(Protocol):
    """The interface of a tokenizer that tasks need."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def __hash__(self) -> int:
        """Hash by identity."""


class Encoder:
    """Token ids of text segments, each segment tokenized once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}

    def ids(self, segment: str) -> list[int]:
        """Token ids of one segment."""
        found = self.cache.get(segment)
        if found is None:
            if len(self.cache) > 100_000:
                self.cache.clear()
            found = self.cache[segment] = self.tokenizer.encode(segment, add_special_tokens=False)
        return found

    def count(self, segments: Sequence[str]) -> int:
        """Number of tokens of several segments."""
        ids = self.ids
        return sum([len(ids(segment)) for segment in segments])


@dataclass(frozen=True)
class Fact:
    """A piece of text that a question may be about, at a place in the document between 0 (start) and 1 (end)."""

    place: float
    segments: Sentence


@dataclass(frozen=True)
class Question:
    """A question as segments, and its answers in the order expected."""

    segments: Sentence
    answers: tuple[str, ...]
    task: str

    @property
    def text(self) -> str:
        """The question as one string, without the line breaks before it."""
        return "".join(self.segments).strip()


@dataclass
class Material:
    """Facts to be hidden in filler (or a complete `body` without filler) and questions about them.

    `filler` is a name in `filler.FILLERS`, or a function from a random generator to a filler.
    """

    facts: list[Fact] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    body: Sentence | None = None
    filler: str | Callable[[Random], Filler] | None = None


Builder = Callable[..., Material]
"""(rng, room, encoder, **options) -> Material; `room` is the approximate number of tokens for the document."""


class TaskError(InputError):
    """The request for a sample cannot be met."""


def pick(rng: Random, items: Sequence[Any]) -> Any:
    """A random item (faster than rng.choice)."""
    return items[int(rng.random() * len(items))]


def number(rng: Random) -> str:
    """A six-digit number."""
    return str(100_000 + int(rng.random() * 900_000))


PADDING = spaced(NOUNS)


def padding(rng: Random, tokens: int, encoder: Encoder) -> Sentence:
    """A list of nouns for the rest of a document once no further sentence fits: about `tokens` tokens, never more."""
    words: Sentence = []
    left = tokens - len(encoder.ids("."))
    while left > 0:
        word = pick(rng, PADDING)
        left -= len(encoder.ids(word))
        if left >= 0:
            words.append(word)
    return [*words, "."] if words else []


def weave(facts: list[Fact], filler: Callable[[], Sentence], rng: Random, room: int, encoder: Encoder) -> list[str]:
    """Insert the facts at their places into filler, for a document of at most `room` tokens; TaskError if too many."""
    facts = sorted(facts, key=lambda fact: fact.place)
    left = room - sum([encoder.count(fact.segments) for fact in facts])
    if left < 0:
        raise TaskError(f"The facts need {room - left} tokens, but only {room} are left for the document.")
    sentences: list[Sentence] = []
    cache = encoder.cache
    while left > 0:
        sentence = filler()
        size = 0
        for segment in sentence:
            size += len(cache.get(segment) or encoder.ids(segment))
        if size > left:
            sentences.append(padding(rng, left, encoder))
            break
        sentences.append(sentence)
        left -= size
    document: list[str] = []
    start = 0
    for fact in facts:
        stop = int(fact.place * (len(sentences) + 1))
        for sentence in sentences[start:stop]:
            document += sentence
        document += fact.segments
        start = stop
    for sentence in sentences[start:]:
        document += sentence
    while document and not document[0].strip():
        document.pop(0)
    if document:
        document[0] = document[0].lstrip()
    return document
