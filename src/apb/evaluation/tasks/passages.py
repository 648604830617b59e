"""Questions about user-supplied passages: the passages that answer a question, shuffled among others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ...errors import InputError, first_line
from .filler import Sentence
from .material import Encoder, Material, Question, TaskError

# Header of a passage, used to count tokens; numbers are longer only with a thousand passages or more.
_HEAD = "\n\nPassage 999:\n"


@dataclass(frozen=True)
class Asked:
    """A question, its answers (any one of them is right) and the ids of the passages that answer it."""

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


@dataclass(frozen=True)
class Passages:
    """Passages by id, and questions about them."""

    texts: dict[str, str]
    asked: tuple[Asked, ...]


def load_passages(path: Path) -> Passages:
    """Read a JSONL file with two kinds of lines.

    ``{"id": NAME, "text": TEXT}`` is a passage; ``{"question": TEXT, "answers": [TEXT, ...], "passages": [NAME, ...]}``
    is a question and the passages that answer it.

    Raises:
        InputError: the file cannot be read, has no question, or a line is invalid or names an unknown passage.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"The passages {str(path)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The passages {str(path)!r} are not UTF-8 text: {error}.") from error
    texts: dict[str, str] = {}
    asked: list[Asked] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if "text" in fields:
                texts[str(fields["id"])] = str(fields["text"]).strip()
            else:
                if not isinstance(fields["answers"], list) or not isinstance(fields["passages"], list):
                    raise ValueError("answers and passages must be lists")
                names = tuple(str(name) for name in fields["passages"])
                asked.append(Asked(str(fields["question"]), tuple(map(str, fields["answers"])), names))
                if not asked[-1].answers or not names:
                    raise ValueError("no answers or no passages")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"Line {number} of {str(path)!r} is neither a passage (id, text) nor a question "
                f"(question, answers, passages): {first_line(error)}."
            ) from error
    missing = sorted({name for item in asked for name in item.passages} - set(texts))
    if missing:
        raise InputError(f"The passages {str(path)!r} have no passage of id {missing[0]!r}, which a question names.")
    if not asked:
        raise InputError(f"The file {str(path)!r} holds no question; give lines with question, answers and passages.")
    return Passages(texts, tuple(asked))


def qa(
    rng: Random, room: int, encoder: Encoder, passages: Passages | None = None, number: int | None = None
) -> Material:
    """Question ``number`` with the passages that answer it and as many others as fit; the last of these is truncated.

    Passages that answer the question are never truncated. If all passages do not fill the room, the others repeat.
    """
    if passages is None or number is None:
        raise TaskError("The task 'qa' asks questions about your own passages; name their file with --passages.")
    if number >= len(passages.asked):
        raise TaskError(f"There are {len(passages.asked)} questions: ask for at most as many samples.")
    item = passages.asked[number]
    needed = [passages.texts[name] for name in item.passages]
    others = [text for name, text in passages.texts.items() if name not in item.passages]
    left = room - sum(size_of(text, encoder) for text in needed)
    if left < 0:
        raise TaskError(f"The passages of question {number + 1} need {room - left} tokens, but only {room} fit.")
    chosen = [*needed, *fill_up(rng, others, left, encoder)]
    rng.shuffle(chosen)
    body = [f"{'' if index == 1 else chr(10) * 2}Passage {index}:\n{text}" for index, text in enumerate(chosen, 1)]
    return Material(questions=[Question([" " + item.question], item.answers, "qa")], body=body)


def fill_up(rng: Random, others: Sequence[str], left: int, encoder: Encoder) -> list[str]:
    """Passages in random order that fill `left` tokens; the last one is truncated at a word."""
    chosen: list[str] = []
    order: list[str] = []
    frame = encoder.count([_HEAD])
    while others and left > frame:
        if not order:
            order = rng.sample(others, len(others))
        text = order.pop()
        size = size_of(text, encoder)
        if size > left:
            text = cut(text, left - frame, encoder)
            size = left
        if text:
            chosen.append(text)
        left -= size
    return chosen


def cut(text: str, room: int, encoder: Encoder) -> str:
    """The first words of a text, up to `room` tokens."""
    words: Sentence = []
    for index, word in enumerate(text.split()):
        room -= encoder.count([" " + word if index else word])
        if room < 0:
            break
        words.append(word)
    return " ".join(words)


def size_of(text: str, encoder: Encoder) -> int:
    """Approximate number of tokens of a passage with its header."""
    return encoder.count([_HEAD, text])
