"""The engine's side of a server: requests one after the other, each read and answered by all ranks together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from ..engine import Engine
from ..errors import Cancelled, InputError, NotFinite
from ..generation import Generation
from ..prompt import Prompt

# More than these are turned away: who asks next would wait for minutes at best.
MOST_WAITING = 64
# Tokens of documents and questions that are read before the first request: kernels are compiled for short blocks and
# for long ones, for few rows of a question and for many, for lengths that are multiples of 16 and for others.
_WARM_UP = ((32000, 64), (31001, 16), (8001, 9))
# Other ranks hear from rank 0 at least that often, so that waiting for work is not taken for its end.
_HEARTBEAT_S = 60.0


@dataclass(frozen=True)
class Progress:
    """So many tokens of the prompt have been read."""

    done: int
    total: int


# What happens to a job: progress, pieces of text, and at last its result or what went wrong.
Event = Progress | str | Generation | Exception


@dataclass
class Job:
    """A prompt to answer. ``tell`` is called with every event, from the worker's thread."""

    prompt: Prompt
    sampling: dict[str, Any]
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Runs jobs on this rank's engine. Every rank has one and calls :meth:`run`; jobs come in on rank 0."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs: queue.Queue[Job] = queue.Queue(MOST_WAITING)
        self._everyone = engine.mesh.everyone
        # Waiting by NCCL would keep the GPUs busy.
        self._control = dist.new_group(backend="gloo") if self._everyone.size > 1 else None

    def submit(self, job: Job) -> bool:
        """Put a job behind those that wait; False where too many do."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    @property
    def waiting(self) -> int:
        """Jobs that have not been begun."""
        return self._jobs.qsize()

    def warm_up(self) -> None:
        """Read and answer nonsense: what is compiled when it first runs should not keep a request waiting."""
        for document, query in _WARM_UP:
            with suppress(InputError):  # too long for the model, or too short for its blocks
                self.engine.generate(Prompt((), (0,) * document, (0,) * query), max_new_tokens=3)

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Answer what comes, until rank 0's ``stopped``, asked between jobs and now and then, says so."""
        while True:
            job, over = self._next(stopped) if self._everyone.rank == 0 else (None, False)
            asked, over = self._shared(None if job is None else (job.prompt, job.sampling), over)
            if over:
                return
            if asked is not None:
                prompt, sampling = asked
                self._answer(prompt, sampling, job)

    def _next(self, stopped: Callable[[], bool]) -> tuple[Job | None, bool]:
        """(the next job that somebody still waits for, whether it is over); neither where none comes for a while."""
        pause = 0.2
        for _ in range(round(_HEARTBEAT_S / pause)):
            if stopped():
                return None, True
            try:
                job = self._jobs.get(timeout=pause)
            except queue.Empty:
                continue
            if not job.cancelled.is_set():
                return job, False
        return None, False

    def _shared(self, asked: Any, over: bool) -> Any:
        """Rank 0's on every rank."""
        box = [asked, over]
        if self._control is not None:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box

    def _answer(self, prompt: Prompt, sampling: dict[str, Any], job: Job | None) -> None:
        """This rank's part of an answer; the job is rank 0's to tell."""
        tell: Callable[[Event], None] = job.tell if job else lambda event: None
        # Every rank has to have one, for rank 0's word to be passed on.
        cancelled = job.cancelled.is_set if job else lambda: False
        try:
            pieces = self.engine.stream(
                prompt,
                progress=lambda done, total: tell(Progress(done, total)),
                cancelled=cancelled,
                **sampling,
            )
            while True:
                try:
                    tell(next(pieces))
                except StopIteration as stop:
                    tell(stop.value)
                    return
        except (Cancelled, NotFinite) as error:  # on all ranks alike
            tell(error)
        except Exception as error:
            tell(error)
            if self._everyone.size > 1:  # the other ranks may be anywhere by now
                raise
