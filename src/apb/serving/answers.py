"""One request's work on one rank: read its prompt, write its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import Cancelled, InputError, NotFinite, unexpected
from ..generation import Generation, Sampling, Scored
from ..prompt import Prompt
from .storing import HandedOver, read_into

if TYPE_CHECKING:
    from .fairness import Share
    from .turns import Turn
    from .worker import Worker


@dataclass(frozen=True)
class Task:
    """What a request asks for; plain values, which travel to all ranks.

    Attributes:
        prompt: what to read.
        sampling: arguments of :class:`apb.generation.Sampling`.
        answers: how many answers to write, one after the other; 0 to read only.
        ordinary: True if the prompt is no document, and is to be read exactly.
        store: folder into which the prompt's document is to be read, for another server to answer; nothing is written
            here then.
    """

    prompt: Prompt
    sampling: dict[str, Any] = field(default_factory=dict)
    answers: int = 1
    ordinary: bool = False
    store: str | None = None

    @property
    def new_tokens(self) -> int:
        """The most tokens of an answer."""
        return int(self.sampling.get("max_new_tokens", 1))


@dataclass(frozen=True)
class Progress:
    """``done`` of the prompt's ``total`` tokens have been read."""

    done: int
    total: int


@dataclass(frozen=True)
class Passed:
    """A document has been read, now or for an earlier request: what its blocks passed on.

    Attributes:
        passages: of each block those that most layers and KV heads passed on: (first token, last + 1, share of these
            that chose the strongest token); None if that is not known.
        went_on: with propagation the runs of tokens that went through the upper layers.
        read_for: the question it was read for, seen from this one; None if it was read for this one and is not kept.
    """

    passages: Sequence[tuple[int, int, float]] | None = ()
    went_on: Sequence[tuple[int, int]] = ()
    read_for: str | None = None

    def within(self, start: int, stop: int, read_for: str | None) -> Passed:
        """What of it lies between two positions of the prompt, counted from the first, and as seen from a question."""
        if self.passages is None:
            return Passed(None, (), read_for)
        cut = [(max(a, start) - start, min(b, stop) - start, much) for a, b, much in self.passages]
        on = [(max(a, start) - start, min(b, stop) - start) for a, b in self.went_on]
        return Passed([each for each in cut if each[0] < each[1]], [each for each in on if each[0] < each[1]], read_for)


@dataclass(frozen=True)
class Written:
    """A piece of an answer's text, with the log-probabilities of its tokens where they are asked for."""

    index: int
    text: str
    scored: Sequence[Scored] = ()


@dataclass(frozen=True)
class Answer:
    """An answer is complete."""

    index: int
    result: Generation


class Failed(RuntimeError):
    """A request failed by an error that was not foreseen; the message names it."""


class Lost(RuntimeError):
    """The ranks that worked on a request are gone."""


def travelling(error: Exception) -> Exception:
    """An error as it travels to another process, which may not know its class."""
    known = next((kind for kind in (InputError, Cancelled, NotFinite) if isinstance(error, kind)), None)
    return Failed(unexpected(error)) if known is None else known(str(error))


def noted(error: BaseException) -> str:
    """An error's kind and the time: what is told of it later, to whoever asks."""
    return f"{type(error).__name__} at {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"


# Events of a request; the last one is the error that it ended with, or None.
Event = Progress | Passed | Written | Answer | HandedOver | Exception | None


class Cancellable(Protocol):
    """A request that has been taken."""

    def cancel(self) -> None:
        """Nobody waits for it any more."""


def answer(worker: Worker, task: Task, tell: Callable[[Event], None], share: Share, turn: Turn) -> None:
    """Do a request's work, with a pause before every layer, and before every token is read."""
    engine = worker.engine_of(task)

    def progress(done: int, total: int) -> None:
        # All is read once the prefill has returned.
        share.read = min(done, share.to_read - 1)
        tell(Progress(done, total))

    if task.store is not None:
        tell(read_into(Path(task.store), engine, task.prompt, progress, turn.pause))
        return
    if task.ordinary:
        session = engine.prefill(task.prompt, max_new_tokens=task.new_tokens, progress=progress, between=turn.pause)
        passed: Passed | None = None
        close: Callable[[], None] = lambda: None  # noqa: E731
    else:
        session, passed, close = worker.kept.open(task.prompt, task.new_tokens, progress, turn.pause)
    try:
        if passed is not None:
            tell(passed)
        share.read = share.to_read
        logits, length = session.logits, len(session.token_ids)
        for index in range(task.answers):
            if index:
                session.rewind(length, logits)
            sampling = Sampling(**task.sampling)
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + index)
            result = _write(engine, session, sampling, index, tell, share, turn)
            result.read_for = None if passed is None else passed.read_for
            tell(Answer(index, result))
    finally:
        close()


def _write(
    engine: Any,
    session: Any,
    sampling: Sampling,
    index: int,
    tell: Callable[[Event], None],
    share: Share,
    turn: Turn,
) -> Generation:
    scored: list[Scored] = []

    def read(token: int) -> None:
        share.written += 1
        turn.read(session, token)

    pieces = engine.answering.stream(session, sampling, None, scored.append, read)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            if scored:
                tell(Written(index, "", scored))
            return stop.value
        tell(Written(index, piece, tuple(scored)))
        scored.clear()
