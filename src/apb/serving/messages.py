"""What the HTTP server and rank 0 say to each other; plain values, which travel through a pipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .answers import Event, Task

# -- to rank 0 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submit:
    """Queue a request under this number."""

    number: int
    task: Task


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this request any more."""

    number: int


@dataclass(frozen=True)
class Drain:
    """End once the requests that are here have been answered."""


# -- from rank 0 -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Rank 0 can answer from now on.

    Attributes:
        pid: its process.
        ranks: how many there are.
        sampling: what a request's sampling is where it does not say, from the checkpoint.
    """

    pid: int
    ranks: int
    sampling: dict[str, Any]


@dataclass(frozen=True)
class KeptFigures:
    """What stays read: documents, requests that found theirs there, and bytes of each place."""

    documents: int = 0
    hits: int = 0
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """How rank 0 is: requests in its queue and at work, seconds until all are answered, the last failure."""

    waiting: int = 0
    running: int = 0
    wait_s: float = 0.0
    last_error: str | None = None
    kept: KeptFigures = field(default_factory=KeptFigures)


@dataclass(frozen=True)
class Taken:
    """True if the request is in the queue, False if that is full, or the error that it can never be answered for."""

    number: int
    taken: bool | Exception
    state: State


@dataclass(frozen=True)
class Happened:
    """An event of a request."""

    number: int
    event: Event
