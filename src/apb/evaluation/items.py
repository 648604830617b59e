"""Evaluation samples: one question about one document, its right answers and the metric that scores a prediction."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


from ..errors import InputError
from ..prompt import BLANK_LINE, Prompt


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
        separator: the text between document and query.
        answer_prefix: forced beginning of the answer, appended to the question.
        other_query: another question of the kind, about another document.
        limit: maximum tokens of prompt and answer together; a longer document is truncated in the middle.
        opening: what a chat template wrote before the document, if the texts have been through one already, whose text
            after the question is in ``query``; None for texts that the model's template is still to be put around.
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
    separator: str = BLANK_LINE
    answer_prefix: str = ""
    limit: int | None = None
    opening: str | None = None
    other_query: str = ""

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The model's prompt, as :meth:`fitted` makes it."""
        return self.fitted(tokenizer)[0]

    def fitted(self, tokenizer: PreTrainedTokenizerBase, question_first: bool = False) -> tuple[Prompt, int]:
        """The model's prompt and the number of tokens that its document lost to fit the limit.

        It has the chat template if there is one. A document that must be cut is cut so that the question fits in front
        as well, so that readings with and without it get the same document.

        Args:
            tokenizer: the model's.
            question_first: the question is going to be asked in front.

        Raises:
            InputError: question and answer alone exceed the limit.
        """
        prompt = self._whole(tokenizer)
        read = prompt.question_first if question_first else prompt
        if self.limit is None or len(read) + self.max_new_tokens <= self.limit:
            return prompt, 0
        room = self.limit - self.max_new_tokens - len(prompt.front) - len(prompt.query)
        if room < 1:
            raise InputError(
                f"Sample {self.sample} of {self.task} does not fit into {self.limit} tokens: its question and answer "
                f"alone need {self.limit - room}; ask for a greater length, for a shorter answer (--max-new-tokens), "
                "or for a model of more positions."
            )
        document = without_middle(prompt.document, room)
        return replace(prompt, document=document), len(prompt.document) - len(document)

    def _whole(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        texts = {"separator": self.separator, "answer_prefix": self.answer_prefix}
        if self.opening is None:
            return Prompt.for_model(tokenizer, self.document, self.query, **texts)
        return Prompt.from_rendered(tokenizer, self.opening, self.document, self.query, **texts)


def each_with_another_query(items: Sequence[Item]) -> list[Item]:
    """Items with the query of the next one of their task (the first one's, for the last) as their other query."""
    following: dict[str, str] = {item.task: item.query for item in reversed(items)}
    found = []
    for item in reversed(items):
        found.append(replace(item, other_query=following[item.task]))
        following[item.task] = item.query
    return found[::-1]


def without_middle(tokens: tuple[int, ...], room: int) -> tuple[int, ...]:
    """The first and the last ``room / 2`` tokens, as InfiniteBench truncates; all of them if they fit."""
    if len(tokens) <= room:
        return tokens
    return tokens[: room // 2] + tokens[len(tokens) - (room - room // 2) :]


def prompt_hash(prompt: Prompt) -> str:
    """Hash, in 16 hex digits, of a prompt's tokens and of the boundaries of its three parts."""
    parts = ";".join(",".join(map(str, part)) for part in (prompt.prefix, prompt.document, prompt.query))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def check_file(path: Path, what: str) -> None:
    """InputError unless a path is of a file; ``what`` says which kind of file is expected."""
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; name the file in it, {what}.")
    if not path.is_file():
        raise InputError(f"The file {str(path)!r} does not exist; name {what}.")


def check_folder(path: Path, what: str) -> None:
    """InputError if a path is of a file; ``what`` says which files the folder is expected to have."""
    if path.is_file():
        raise InputError(f"{str(path)!r} is a file; name the folder it is in, with {what}.")


class Skipped:
    """Unusable lines of data files, each with its reason as a sentence.

    Attributes:
        reasons: one for each unusable line.
        notes: what else the user should know of the files.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.notes: list[str] = []
        self._lists: set[Path] = set()

    def lines(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield (line number, object) of a JSONL file; lines that hold no JSON object are recorded and skipped.

        Raises:
            InputError: the file cannot be read.
        """
        with _opened(path) as file:
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

    def entries(self, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """As :meth:`lines`, of a JSON list as well, whose entries are numbered from 1.

        Raises:
            InputError: the file cannot be read, or begins as a list and is none.
        """
        with _opened(path) as file:
            begins = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
            if begins.startswith(b"["):
                file.seek(0)
                yield from self._listed(path, file.read())
                return
        yield from self.lines(path)

    def _listed(self, path: Path, data: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
        self._lists.add(path)
        try:
            entries = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"The file {str(path)!r} begins as a list but is not JSON: {error}.") from error
        for number, fields in enumerate(entries, 1):
            if isinstance(fields, dict):
                yield number, fields
            else:
                self.add(path, number, f"is not an object but of type {type(fields).__name__}")

    def add(self, path: Path, number: int, reason: str) -> None:
        """Record an unusable line, or entry of a list."""
        what = "entry" if path in self._lists else "line"
        self.reasons.append(f"{what} {number} of {path} {reason}, and was skipped")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read bytes from; InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"The file {str(path)!r} cannot be read: {error.strerror}.") from error


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
