"""Headings: chapters with notes; a note belongs to the last heading before it."""

from __future__ import annotations

from random import Random

from .filler import FILLERS, Sentence, parse, spaced
from .lexicon import TITLES
from .material import Encoder, Fact, Material, Pair, Question, pick
from .needles import draw_keys, fill

CHAPTERS = spaced(TITLES)
NOTES = (
    "Note on the{adj}{noun}:",
    "Here is the note on the{adj}{noun}:",
    "A note on the{adj}{noun} follows:",
)
REMARKS = (
    " it{verb} the{noun} near the{place}.",
    " the{noun} was{adj} that{time}.",
    "{name}{verb} it in{season}.",
    " seen at the{place} by{name}.",
)
QUESTIONS = (
    "In which chapter is the note on the{adj}{noun}?",
    "Which chapter holds the note on the{adj}{noun}?",
    "Under which chapter stands the note on the{adj}{noun}?",
)
PARSED_REMARKS = tuple(parse(remark) for remark in REMARKS)
NOTE_SIZE = 17
"""Approximate number of tokens of a note."""


def heading(title: str) -> Sentence:
    """A chapter heading, which starts a new paragraph."""
    return ["\n\nChapter", title, "."]


def note(rng: Random, topic: Pair) -> Sentence:
    """A note on a topic: an opening that names the topic, and a remark that no question is about."""
    remark = [item if isinstance(item, str) else pick(rng, item) for item in pick(rng, PARSED_REMARKS)]
    return [*fill(pick(rng, NOTES), topic), *(segment for segment in remark if segment.strip())]


def chapters(rng: Random, count: int, notes: int) -> Material:
    """`count` headings, the first at the start, and `notes` notes with one question each."""
    titles = rng.sample(CHAPTERS, count)
    starts = [0.0, *sorted(rng.random() for _ in range(count - 1))]
    facts = [Fact(start, heading(title)) for start, title in zip(starts, titles, strict=True)]
    questions: list[Question] = []
    for topic in draw_keys(rng, notes):
        place = rng.random()
        title = [title for start, title in zip(starts, titles, strict=True) if start < place][-1]
        facts.append(Fact(place, note(rng, topic)))
        questions.append(Question(fill(pick(rng, QUESTIONS), topic), (title.strip(),), "headings"))
    return Material(facts, questions)


def headings(
    rng: Random,
    room: int,
    encoder: Encoder,
    headings: int = 4,
    notes: int = 16,
    haystack: str | None = None,
) -> Material:
    """`headings` chapter headings and up to `notes` notes at random places; the question asks for a note's chapter."""
    fitting = (room * 9 // 10 - 5 * headings) // NOTE_SIZE
    material = chapters(rng, headings, max(1, min(notes, fitting)))
    material.questions = material.questions[:1]
    material.filler = haystack or pick(rng, list(FILLERS))
    return material
