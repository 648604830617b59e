"""Evaluation samples: one question about one document, its right answers and the metric that scores a prediction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


from ..errors import InputError
from ..prompt import Prompt


@dataclass(frozen=True)
class Item:
    """A sample of a suite.

    Attributes:
        suite, task: the suite and its task.
        length: nominal length in tokens, under which results are listed.
        sample: its name within the task.
        document, query: the text and the question.
        answers: the right answers; the metric defines the meaning of several.
        metric: a name in scoring.METRICS.
        max_new_tokens: limit on the answer's tokens.
        answer_prefix: forced beginning of the answer, appended to the question.
        limit: maximum tokens of prompt and answer together; a longer document is truncated in the middle.
    """

    suite: str
    task: str
    length: int
    sample: str
    document: str
    query: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    answer_prefix: str = ""
    limit: int | None = None

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The model's prompt, with the chat template if there is one and the document truncated to the limit.

        Raises:
            InputError: question and answer alone exceed the limit.
        """
        prompt = Prompt.for_model(tokenizer, self.document, self.query, answer_prefix=self.answer_prefix)
        if self.limit is None:
            return prompt
        room = self.limit - self.max_new_tokens - len(prompt.prefix) - len(prompt.query)
        if room < 1:
            raise InputError(
                f"Sample {self.sample} of {self.task} does not fit into {self.limit} tokens: its question and answer "
                f"alone need {self.limit - room}; ask for a greater length."
            )
        return replace(prompt, document=without_middle(prompt.document, room))


def without_middle(tokens: tuple[int, ...], room: int) -> tuple[int, ...]:
    """The first and the last ``room / 2`` tokens, as InfiniteBench truncates; all of them if they fit."""
    if len(tokens) <= room:
        return tokens
    return tokens[: room // 2] + tokens[len(tokens) - (room - room // 2) :]


def prompt_hash(prompt: Prompt) -> str:
    """Hash, in 16 hex digits, of a prompt's tokens and of the boundaries of its three parts."""
    parts = ";".join(",".join(map(str, part)) for part in (prompt.prefix, prompt.document, prompt.query))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


class Skipped:
    """Unusable lines of data files, each with its reason as a sentence."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def lines(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield (line number, object) of a JSONL file; lines that hold no JSON object are recorded and skipped.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    except UnicodeDecodeError:
                        self.add(path, number, "is not UTF-8 text")
                        continue
                    except (ValueError, RecursionError) as error:
                        self.add(path, number, f"is not JSON ({error})")
                        continue
                    if isinstance(fields, dict):
                        yield number, fields
                    else:
                        self.add(path, number, f"is not an object but of type {type(fields).__name__}")
        except OSError as error:
            raise InputError(f"The file {str(path)!r} cannot be read: {error.strerror}.") from error

    def add(self, path: Path, number: int, reason: str) -> None:
        """Record an unusable line."""
        self.reasons.append(f"line {number} of {path} {reason}, and was skipped")


def field(fields: Mapping[str, Any], name: str) -> Any:
    """A field of a line; ValueError if it is missing or empty."""
    value = fields.get(name)
    if value is None or value in ("", [], {}):
        raise ValueError(f"has no field {name!r}")
    return value


def text_field(fields: Mapping[str, Any], name: str) -> str:
    """A text field; ValueError if it is not text."""
    value = field(fields, name)
    if not isinstance(value, str):
        raise ValueError(f"has no text in field {name!r}")
    _check_characters(name, value)
    return value


def answers_field(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field with an answer or a list of answers, as strings; ValueError for empty ones and for other types."""
    value = field(fields, name)
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(answer, (str, int, float)) for answer in given):
        raise ValueError(f"has an answer that is neither text nor a number in field {name!r}")
    answers = tuple(map(str, given))
    if not all(answers):
        raise ValueError(f"has an empty answer in field {name!r}")
    _check_characters(name, "".join(answers))
    return answers


def _check_characters(name: str, text: str) -> None:
    """Raise ValueError if a text has a lone surrogate, which JSON can express but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has a lone surrogate in field {name!r}") from error
