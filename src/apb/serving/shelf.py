"""Documents that clients have given to keep: their texts, by id. What was read of them is in :mod:`.kept`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..prompt import Prompt
from .answers import Event, Progress
from .ranks import Job
from .replies import Refusal, failure

# Characters of all texts together; of more, the oldest have to be deleted first.
MOST_CHARACTERS = 1 << 28


@dataclass
class Kept:
    """A document, and how far it has been read."""

    id: str
    text: str
    name: str | None
    question: str | None
    tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    read: int = 0
    status: str = "reading"
    error: str | None = None
    job: Job | None = None

    def heard(self, event: Event) -> None:
        """Take an event of its reading."""
        if isinstance(event, Progress):
            self.read = event.done
        elif isinstance(event, Exception):
            self.status, self.error, self.job = "failed", str(failure(event)), None
        elif event is None:
            self.status, self.read = "read", self.tokens

    def told(self) -> dict[str, Any]:
        """What responses say of it."""
        shown = ("id", "name", "question", "created", "status", "tokens", "read", "error")
        return {"object": "document", "characters": len(self.text)} | {name: getattr(self, name) for name in shown}


class Shelf:
    """The documents by id, which follows from text and question: the same again is the same document."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept.values())

    def __getitem__(self, number: str) -> Kept:
        if number not in self._kept:
            raise Refusal(404, f"There is no document {number!r}; GET /v1/documents lists them.", code="not_found")
        return self._kept[number]

    def text_of(self, number: str) -> str:
        """The text of a document."""
        return self[number].text

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

    def remove(self, number: str) -> None:
        """Forget a document; one that is being read is no longer."""
        kept = self[number]
        if kept.job is not None:
            kept.job.cancel()
        del self._kept[number]
