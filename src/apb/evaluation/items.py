"""What is evaluated: one question of one document, its answers, and how an answer is judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..prompt import Prompt


@dataclass(frozen=True)
class Item:
    """A sample of a suite.

    Attributes:
        suite, task: where it belongs.
        length: the length it is listed under, in tokens.
        sample: its name within the task.
        document, query: the text and the question.
        answers: what is right; what several mean is the metric's affair.
        metric: a name of scoring.METRICS.
        max_new_tokens: the longest answer.
        answer_prefix: how the answer is made to begin; the model reads it after the question.
        limit: tokens that prompt and answer may have together: of a longer document the middle is left out.
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
        """The prompt that a model reads: chat template where there is one, the document cut to the limit."""
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
    """The first half of `room` tokens and the last one, as InfiniteBench truncates; all of them where they fit."""
    if len(tokens) <= room:
        return tokens
    return tokens[: room // 2] + tokens[len(tokens) - (room - room // 2) :]


def prompt_hash(prompt: Prompt) -> str:
    """16 hex digits that tell prompts apart: of their tokens and of where the three parts end."""
    parts = ";".join(",".join(map(str, part)) for part in (prompt.prefix, prompt.document, prompt.query))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


class Skipped:
    """Lines of data files that could not be used, with the reasons, in sentences."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def lines(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Numbers and objects of a JSONL file's lines; what is no JSON object is noted, and the rest goes on."""
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
                        self.add(path, number, f"is not an object but {type(fields).__name__}")
        except OSError as error:
            raise InputError(f"The file {str(path)!r} cannot be read: {error.strerror}.") from error

    def add(self, path: Path, number: int, reason: str) -> None:
        """Note a line that cannot be used."""
        self.reasons.append(f"line {number} of {path} {reason}, and was left out")


def field(fields: Mapping[str, Any], name: str) -> Any:
    """A field of a line; ValueError that names it where it is missing or empty."""
    value = fields.get(name)
    if value is None or value in ("", [], {}):
        raise ValueError(f"has no field {name!r}")
    return value


def text_field(fields: Mapping[str, Any], name: str) -> str:
    """A field that is text."""
    value = field(fields, name)
    if not isinstance(value, str):
        raise ValueError(f"has no text in field {name!r}")
    _check_characters(name, value)
    return value


def answers_field(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field that is an answer or a list of them, as texts."""
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
    """ValueError where a text holds half of a surrogate pair, which JSON can spell and nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has half a character in field {name!r}") from error
