"""The server's worker: it answers requests one at a time, each on all ranks together."""

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

# Length of the queue; further requests are refused, as they would wait for minutes at best.
MOST_WAITING = 64
# (document, query) tokens of the warm-up prompts: kernels are compiled for short and long blocks, for few and many
# query rows, for lengths that are multiples of 16 and for others.
_WARM_UP = ((32000, 64), (31001, 16), (8001, 9))
# Rank 0 sends a heartbeat at least this often, so that idle ranks do not time out.
_HEARTBEAT_S = 60.0


@dataclass(frozen=True)
class Progress:
    """``done`` of the prompt's ``total`` tokens have been read."""

    done: int
    total: int


# Events of a job: progress, pieces of text, and at last its result or the error.
Event = Progress | str | Generation | Exception


@dataclass
class Job:
    """A prompt to answer; ``tell`` is called with every event, on the worker's thread."""

    prompt: Prompt
    sampling: dict[str, Any]
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Runs jobs on this rank's engine; every rank has one and calls :meth:`run`, and jobs are submitted on rank 0."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs: queue.Queue[Job] = queue.Queue(MOST_WAITING)
        self._everyone = engine.mesh.everyone
        # Waiting in an NCCL collective would keep the GPUs busy.
        self._control = dist.new_group(backend="gloo") if self._everyone.size > 1 else None

    def submit(self, job: Job) -> bool:
        """Queue a job; False if the queue is full."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    @property
    def waiting(self) -> int:
        """Number of queued jobs."""
        return self._jobs.qsize()

    def warm_up(self) -> None:
        """Answer dummy prompts, so that no request waits for kernels to be compiled."""
        for document, query in _WARM_UP:
            with suppress(InputError):  # too long for the model, or too short for its blocks
                self.engine.generate(Prompt((), (0,) * document, (0,) * query), max_new_tokens=3)

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Answer jobs until ``stopped`` returns True on rank 0, where it is polled between jobs and while idle."""
        while True:
            job, over = self._next(stopped) if self._everyone.rank == 0 else (None, False)
            asked, over = self._shared(None if job is None else (job.prompt, job.sampling), over)
            if over:
                return
            if asked is not None:
                prompt, sampling = asked
                self._answer(prompt, sampling, job)

    def _next(self, stopped: Callable[[], bool]) -> tuple[Job | None, bool]:
        """(next job that is not cancelled, False), (None, True) once stopped, or (None, False) after a heartbeat."""
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
        """Broadcast ``[asked, over]`` from rank 0."""
        box = [asked, over]
        if self._control is not None:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box

    def _answer(self, prompt: Prompt, sampling: dict[str, Any], job: Job | None) -> None:
        """Answer a prompt together with the other ranks; ``job`` is given on rank 0, which reports its events."""
        tell: Callable[[Event], None] = job.tell if job else lambda event: None
        # Every rank passes a callback: the engine broadcasts rank 0's answer.
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
            if self._everyone.size > 1:  # the ranks are out of step by now
                raise
