"""Documents that clients have given to keep: their texts, by id. What was read of them is in :mod:`.kept`."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..asking import ANOTHER
from ..errors import first_line
from ..prompt import Prompt
from .answers import Cancellable, Event, Passed, Progress
from .prompts import Asked
from .replies import Refusal, failure

# Characters of all texts together; of more, the oldest have to be deleted first.
MOST_CHARACTERS = 1 << 28
# What is written of a document.
_WRITTEN = ("id", "text", "name", "question", "tokens", "created", "passed")


@dataclass
class Kept:
    """A document, and how far it has been read.

    Attributes:
        question: what it is or was read for, if that is known.
        passed: what its blocks passed on, in characters, once it has been read.
    """

    id: str
    text: str
    name: str | None
    question: str | None
    tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    read: int = 0
    status: str = "unread"
    error: str | None = None
    job: Cancellable | None = None
    passed: dict[str, list[dict[str, float]]] | None = None

    def heard(self, event: Event) -> None:
        """Take an event of its own reading."""
        if isinstance(event, Progress):
            self.read = event.done
        elif isinstance(event, Exception):
            self.status, self.error, self.job = "failed", str(failure(event)), None
        elif event is None:
            self.status, self.read = "read", self.tokens

    def passes(self, asked: Asked, question: str | None, event: Event) -> None:
        """Take what was passed on for a request that asks it."""
        if not isinstance(event, Passed):
            return
        if event.passages is not None:
            passages = [(asked.characters(start, stop), share) for start, stop, share in event.passages]
            went_on = [asked.characters(start, stop) for start, stop in event.went_on]
            self.passed = {
                "data": [_span(place) | {"share": round(share, 4)} for place, share in passages if place],
                "went_on": [_span(place) for place in went_on if place],
            }
        if self.status != "reading":
            self.status, self.read = "read", self.tokens
        if event.read_for != ANOTHER:
            self.question = question

    def passages(self) -> dict[str, Any]:
        """The body of what was passed on, in characters of the text; Refusal while nothing is known of it."""
        if self.passed is None:
            message = f"What was passed on of the document {self.id!r} is not known"
            why = "was not kept" if self.status == "read" else "is not read yet; ask it a question first"
            raise Refusal(404, f"{message}: it {why}.", code="not_known")
        return {"object": "list", "question": self.question} | self.passed

    def told(self) -> dict[str, Any]:
        """What responses say of it."""
        shown = ("id", "name", "question", "created", "status", "tokens", "read", "error")
        return {"object": "document", "characters": len(self.text)} | {name: getattr(self, name) for name in shown}


def _span(place: tuple[int, int]) -> dict[str, float]:
    return {"start": place[0], "stop": place[1]}


class Shelf:
    """The documents by id, which follows from text and question: the same again is the same document."""

    def __init__(self, folder: Path | None = None) -> None:
        """Make one; with a folder the documents are there again after a restart, if they had been read."""
        self._kept: dict[str, Kept] = {}
        self._folder = None if folder is None else folder / "given"
        for path in sorted(self._folder.glob("*.json"), key=_written) if self._folder is not None else ():
            try:
                kept = Kept(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                print(f"apb: {str(path)!r} is not there any more. {first_line(error)}.", file=sys.stderr, flush=True)
                path.unlink(missing_ok=True)
            else:
                kept.read, kept.status = kept.tokens, "read"
                self._kept[kept.id] = kept

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept.values())

    def __getitem__(self, number: str) -> Kept:
        if number not in self._kept:
            raise Refusal(404, f"There is no document {number!r}; GET /v1/documents lists them.", code="not_found")
        return self._kept[number]

    def put(self, text: str, name: str | None, question: str | None, prompt: Prompt) -> Kept:
        """Keep a document, or find it."""
        number = "doc-" + hashlib.sha256(f"{question!r}\n{text}".encode()).hexdigest()[:24]
        if number not in self._kept:
            if sum(len(kept.text) for kept in self) + len(text) > MOST_CHARACTERS:
                raise Refusal(
                    413, f"Documents have more than {MOST_CHARACTERS:,} characters together; delete some first."
                )
            self._kept[number] = Kept(number, text, name, question, len(prompt))
        return self._kept[number]

    def heard(self, kept: Kept, event: Event) -> None:
        """Take an event of a document's reading; once it has been read it is there after a restart too."""
        kept.heard(event)
        if event is None:
            self._write(kept)

    def overheard(self, kept: Kept, asked: Asked, question: str, event: Event) -> None:
        """Take an event of a request that asks a document, and reads it if nobody has."""
        before = kept.status, kept.question, kept.passed
        kept.passes(asked, question, event)
        if before != (kept.status, kept.question, kept.passed):
            self._write(kept)

    def _write(self, kept: Kept) -> None:
        if kept.status != "read" or self._folder is None or kept.id not in self._kept:
            return
        fields = {name: getattr(kept, name) for name in _WRITTEN}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = self._folder / f"{kept.id}.part"
            part.write_text(json.dumps(fields), encoding="utf-8")
            part.replace(self._folder / f"{kept.id}.json")
        except OSError as error:
            print(f"apb: a document will not be there after a restart: {error}.", file=sys.stderr, flush=True)

    def remove(self, number: str) -> None:
        """Forget a document; one that is being read is no longer."""
        kept = self[number]
        if kept.job is not None:
            kept.job.cancel()
        del self._kept[number]
        if self._folder is not None:
            (self._folder / f"{number}.json").unlink(missing_ok=True)


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns
