"""Training data of retaining heads: JSONL with one question and answer per line, read and tokenized lazily."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...errors import InputError, first_line
from ...hf.chat import Turn, rendered, template_of
from ...hf.texts import Piece, encode

SHAPES = '{"document", "query", "answer"}, {"prompt", "answer"} or {"messages"}'
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the answer that follows it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Samples:
    """The samples of a JSONL file: all lines are validated at the start, and each is read again when indexed.

    A line is an object with one of three sets of fields: ``document``, ``query`` and ``answer`` (``prompt`` is accepted
    for ``document``); ``prompt`` and ``answer`` alone, for a prompt that includes its question; or ``messages``, a chat
    whose last message is the assistant's. Empty lines are skipped.

    Attributes:
        digest: SHA-256 of the file.

    Raises:
        InputError: the file cannot be read or has no samples, or a line is invalid; names the line.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.template = template_of(tokenizer)
        self.max_length = max_length
        self._starts = array("q")
        self._numbers = array("q")
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        self._parse(line, number)
                        self._starts.append(start)
                        self._numbers.append(number)
                    start += len(line)
        except OSError as error:
            raise InputError(f"The data file {str(path)!r} cannot be read: {error.strerror}.") from error
        if not self._starts:
            raise InputError(f"The data file {str(path)!r} has no samples; give one JSON object per line.")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        number = self._numbers[index]
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            fields = self._parse(file.readline(), number)
        try:
            prompt, answer = self._tokens(fields)
        except (InputError, ValueError) as error:
            raise self._wrong(number, first_line(error)) from error
        if not prompt or not answer:
            raise self._wrong(number, "its prompt or its answer has no tokens")
        return cut(Example(prompt, answer), self.max_length)

    def _tokens(self, fields: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of prompt and answer: the answer's are those after the prompt in the tokens of both together."""
        *asked, answer = self._pieces(fields)
        chat = self.template is not None
        prompt = encode(self.tokenizer, asked, special=not chat, template=self.template).ids
        both = encode(self.tokenizer, [*asked, answer], special=not chat, template=self.template).ids
        if both[: len(prompt)] != prompt:  # the answer's beginning and the prompt's end make one token
            both = (*prompt, *encode(self.tokenizer, [answer], special=False).ids)
        return prompt, both[len(prompt) :]

    def _pieces(self, fields: dict[str, Any]) -> list[Piece]:
        """The pieces of the prompt, followed by the answer."""
        if "messages" in fields:
            *asked, last = fields["messages"]
            turns = [Turn(turn["role"], [Piece(turn["content"], f"message {n}")]) for n, turn in enumerate(asked, 1)]
            assert self.template is not None, "checked when the file was read"
            return [*rendered(self.tokenizer, self.template, turns), Piece(last["content"], "answer")]
        document: str = fields["document" if "document" in fields else "prompt"]
        pieces = [Piece(document, "document")]
        if "query" in fields:
            pieces += [Piece("\n\n"), Piece(fields["query"], "query")]
        if self.template is not None:  # after a chat template the answer begins at once
            pieces = rendered(self.tokenizer, self.template, [Turn("user", pieces)])
            return [*pieces, Piece(fields["answer"], "answer")]
        # After a plain question it is the next word.
        answer = fields["answer"] if fields["answer"][:1].isspace() else " " + fields["answer"]
        return [*pieces, Piece(answer, "answer")]

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        """The fields of a line; InputError with its number if it is invalid."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._wrong(number, f"it is not JSON ({first_line(error)})") from error
        if not isinstance(fields, dict):
            raise self._wrong(number, f"it must be an object, not a {type(fields).__name__}")
        if "messages" in fields:
            self._check_messages(fields["messages"], number)
            return fields
        texts = [name for name in ("document", "prompt") if name in fields]
        if len(texts) != 1:
            raise self._wrong(number, f"it needs one of these sets of fields: {SHAPES}")
        wanted = [*texts, "answer"] + (["query"] if "query" in fields or texts == ["document"] else [])
        for name in wanted:
            self._check_text(fields.get(name), name, number)
        return fields

    def _check_messages(self, messages: Any, number: int) -> None:
        if self.template is None:
            raise self._wrong(number, "it holds chat messages, and this model's tokenizer has no chat template")
        if not isinstance(messages, list) or len(messages) < 2:
            raise self._wrong(number, "its messages must be a list of at least a question and an answer")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in _ROLES:
                raise self._wrong(number, f"each message must be an object with a role of {', '.join(_ROLES)}")
            self._check_text(message.get("content"), "content", number)
        if messages[-1]["role"] != "assistant":
            raise self._wrong(number, "its last message must be the assistant's answer")

    def _check_text(self, text: Any, name: str, number: int) -> None:
        if not isinstance(text, str) or not text.strip():
            raise self._wrong(number, f"its {name!r} must be a non-empty text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._wrong(number, f"its {name!r} is not valid text at character {error.start}") from error

    def _wrong(self, number: int, what: str) -> InputError:
        return InputError(f"Line {number} of {str(self.path)!r} cannot be used: {what.rstrip('.')}.")


def cut(example: Example, most: int) -> Example:
    """Truncate to ``most`` tokens: the answer to its first ``most // 2``, the prompt by its middle."""
    answer = example.answer[: max(1, most // 2)]
    room = most - len(answer)
    prompt = example.prompt
    if len(prompt) > room:
        front = room - room // 2
        prompt = prompt[:front] + prompt[len(prompt) - room // 2 :]
    return Example(prompt, answer)


def order(size: int, seed: int, first: int) -> Iterator[int]:
    """Endless sample indices from position ``first`` on; every epoch is its own permutation of all ``size`` samples."""
    for epoch in count(first // size):
        indices = list(range(size))
        Random(f"heads {seed} {epoch}").shuffle(indices)
        yield from indices[first % size if epoch == first // size else 0 :]


def ahead(samples: Samples, indices: Iterator[int], lookahead: int = 4) -> Iterator[Example]:
    """Yield the samples at ``indices``, tokenized ahead of time by a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(samples.__getitem__, index) for index in islice(indices, lookahead)]
        while waiting:
            example = waiting.pop(0).result()
            waiting += [pool.submit(samples.__getitem__, index) for index in islice(indices, 1)]
            yield example
