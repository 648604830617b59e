"""Haystacks: filler sentences that no question is about.

A sentence is a list of segments: strings that begin with a space, a line break or a punctuation mark, so that with a
word-level tokenizer the tokens of the text are the concatenated tokens of its segments.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from .lexicon import ADJECTIVES, NAMES, NOUNS, PLACES, VERBS, WORDS

Sentence = list[str]
Filler = Callable[[], Sentence]
Template = tuple[str | tuple[str, ...], ...]


def spaced(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words, each with a space before it."""
    return tuple(" " + word for word in words)


SLOTS: dict[str, tuple[str, ...]] = {
    "adj": spaced(ADJECTIVES),
    "noun": spaced(NOUNS),
    "verb": spaced(VERBS),
    "name": spaced(NAMES),
    "place": spaced(PLACES),
    "count": tuple(f" {n}" for n in range(2, 100)),
    "time": spaced(("morning", "evening", "night", "week", "month", "year", "afternoon", "day")),
    "season": spaced(("spring", "summer", "autumn", "march", "april", "june", "july", "august", "october")),
    "way": spaced(("slowly", "quickly", "often", "never", "always", "rarely", "once", "twice", "again", "together")),
}

SHAPES = """
The{adj}{noun}{verb} the{noun} near the{place}.
On that{time},{name}{verb} a{adj}{noun} and left.
Nobody at the{place} knew why the{noun} was so{adj}.
{name} and{name} walked to the{place} with a{noun}.
There were{count}{adj} seats in the old{place}.
When the{noun} was{adj},{name} went home.
It was a{adj}{time} in the{place}, and the{noun} was gone.
The{noun} of the{adj}{place} had been there for{count} years.
In{season} the people of the{place}{verb} each{adj}{noun}{way}.
{name}{verb} the{adj}{noun}, because the{noun} was{adj}.
Some say that the{place} was{adj}, others that it was{adj}.
After{count} days the{noun} came back to the{place}.
They{verb} it{way}, as one does in a{adj}{place}.
Every{time} a{noun} stood before the{adj}{place}.
The letter from{name} spoke of a{noun} and of{count} more.
What{name}{verb} that{time} was not a{noun} but a{adj}{noun}.
By{season} the{adj}{noun} had{way}{verb} the{place}.
A{noun}, a{noun} and a{adj}{noun} lay on the floor of the{place}.
Between the{place} and the{place} there was only a{adj}{noun}.
{name} had{count} of them, all{adj} and none{adj}.
The road to the{place} was{adj} in{season}.
So the{noun}{verb} the{noun}, and nobody{way} asked.
"My{noun} is{adj}," said{name}{way}.
It took{count} people to move the{adj}{noun} out of the{place}.
Near the{place},{name}{verb} both the{noun} and the{noun}.
If the{time} had been less{adj}, the{noun} would have stayed.
The{adj}{adj}{noun} was sold at the{place} in{season}.
{name} wrote to{name} about the{noun} from the{place}.
Not one{noun} in{count} was as{adj} as that.
Later that{time} the{place} was{adj} and empty.
The{place} lies{count} miles from the{adj}{place}.
For{name} the{noun} was{way} more than a{noun}.
Then the{time} ended and the{adj}{noun} was put away.
Who{verb} the{noun}? It was{name}, of course.
The keeper of the{place}{verb} a{noun} for the{adj}{noun}.
"""

NOISE = (
    "The grass grows slowly in the field. The sky stays blue all day. The sun goes down behind the hill. "
    "We walk on and we come back. So it was and so it is."
)


def parse(shape: str) -> Template:
    """Split a shape into literals and slots; the first literal gets a leading space."""
    items: list[str | tuple[str, ...]] = []
    for part in re.split(r"(\{\w+\})", shape.strip()):
        if part.startswith("{"):
            items.append(SLOTS[part[1:-1]])
        elif part:
            items.append(part if items else " " + part)
    return tuple(items)


TEMPLATES: tuple[Template, ...] = tuple(parse(shape) for shape in SHAPES.strip().splitlines())
NOISE_SENTENCES: tuple[str, ...] = tuple(" " + part + "." for part in NOISE.rstrip(".").split(". "))
SOUP_WORDS = spaced(WORDS)


def paragraph(sentence: Sentence) -> Sentence:
    """The sentence as the first of a new paragraph."""
    return ["\n\n" + sentence[0].lstrip(), *sentence[1:]]


def prose(rng: Random) -> Callable[[], Sentence]:
    """Running text: sentences of many shapes, with paragraph breaks after three to nine of them."""
    draw, left = rng.random, 0

    def sentence() -> Sentence:
        nonlocal left
        template = TEMPLATES[int(draw() * len(TEMPLATES))]
        segments = [item if type(item) is str else item[int(draw() * len(item))] for item in template]
        left -= 1
        if left > 0:
            return segments
        left = 3 + int(draw() * 7)
        return paragraph(segments)

    return sentence


def noise(rng: Random) -> Callable[[], Sentence]:
    """The same few sentences, repeated."""
    index = int(rng.random() * len(NOISE_SENTENCES)) - 1

    def sentence() -> Sentence:
        nonlocal index
        index = (index + 1) % len(NOISE_SENTENCES)
        return [NOISE_SENTENCES[index]]

    return sentence


def soup(rng: Random) -> Callable[[], Sentence]:
    """Random words without grammar, six to fifteen per sentence."""
    draw, count = rng.random, len(SOUP_WORDS)

    def sentence() -> Sentence:
        return [*(SOUP_WORDS[int(draw() * count)] for _ in range(6 + int(draw() * 10))), "."]

    return sentence


FILLERS: dict[str, Callable[[Random], Filler]] = {"prose": prose, "noise": noise, "soup": soup}
"""Kinds of haystack: each maps a random generator to a function that returns the next sentence."""
