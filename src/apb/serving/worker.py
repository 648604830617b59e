"""The server's worker: requests take turns with the model, each piece of work on all ranks together.

Rank 0 decides which request works next, and tells the others; a piece is one layer of a prefill or one token of an
answer. Every rank keeps the same requests and goes through the same pieces in the same order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..engine import Engine
from ..errors import Cancelled, InputError
from ..prompt import Prompt
from .answers import Event, Task, answer, noted
from .fairness import Pace, Share, next_of
from .kept import KeptDocuments, Places
from .turns import Ended, Turn

# Length of the queue; further requests are refused, as they would wait for minutes at best.
MOST_WAITING = 64
# Requests that are read or answered at a time, each on a thread of its own.
MOST_RUNNING = 16
# Share of the memory beside the weights that documents may take.
_DOCUMENTS = 0.3
# (document, query) tokens of the warm-up prompts: kernels are compiled for short and long blocks, for few and many
# query rows, for lengths that are multiples of 16 and for others.
_WARM_UP = ((32000, 64), (31001, 16), (8001, 9))
# Rank 0 tells the others at least this often that there is nothing to do.
_HEARTBEAT_S = 5.0
# Seconds after which no request that needs less memory overtakes one that waits for more.
_PATIENCE_S = 60.0
# Seconds without a request until documents are written to disk: the next question often follows the first at once.
_QUIET_S = 2.0
# Seconds between looks at whether the server has been stopped.
_PAUSE_S = 0.2
# What rank 0 may tell the others to do, and how a rank's last piece of work ended.
_NOTHING, _START, _WORK, _CANCEL, _WRITE, _STOP = range(6)
_GOES_ON, _ENDED, _FAILED = range(3)


@dataclass
class Job:
    """A request on rank 0; ``tell`` is called with every event, on a thread of the worker's."""

    task: Task
    tell: Callable[[Event], None]
    share: Share
    bytes: int
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for it any more: it ends before its next piece of work."""
        self.cancelled.set()


class Worker:
    """Answers requests on this rank's engine; every rank has one and calls :meth:`run`. They come in on rank 0.

    Attributes:
        engine, exact: the engine, and the one that ordinary requests are read with.
        kept: documents that stay read.
        draining: True once no further requests are taken.
        last_error: the last failure that was not the client's.
    """

    def __init__(self, engine: Engine, places: Places | None = None) -> None:
        self.engine, self.exact = engine, engine.exactly()
        self._everyone = engine.mesh.everyone
        # Waiting in an NCCL collective would keep the GPUs busy.
        self._control = dist.new_group(backend="gloo") if self._everyone.size > 1 else None
        self._came = threading.Condition()
        self._waiting: list[Job] = []
        self._running: dict[int, Job] = {}  # rank 0's
        self._turns: dict[int, Turn] = {}
        self._count = 0
        self._ended = 0.0  # when the last request had
        self._settled = False  # True if nothing is to be written; to look compares the tokens of all documents
        self._pace = Pace()
        plan = self.exact.plan(Prompt((), (0,) * engine.group.size * 64, (0,)), 1)
        self.room = self.exact.demand(plan, 1)[2]
        self.kept = KeptDocuments(engine, int(self.room * _DOCUMENTS), places or Places())
        self.draining = False
        self.last_error: str | None = None

    def submit(self, task: Task, tell: Callable[[Event], None]) -> Job | None:
        """Queue a request; None if the queue is full.

        Raises:
            InputError: it can never be answered.
        """
        engine = self.exact if task.ordinary else self.engine
        plan = engine.plan(task.prompt, task.new_tokens)
        share = Share(plan.total, task.new_tokens * max(task.answers, 1))
        job = Job(task, tell, share, engine.demand(plan, task.new_tokens)[0])
        with self._came:
            if len(self._waiting) >= MOST_WAITING or self.draining:
                return None
            self._waiting.append(job)
            self._came.notify()
        return job

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return sum(not job.cancelled.is_set() for job in self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that are being read or answered."""
        return len(self._running)

    def wait_s(self) -> float:
        """Predicted seconds until the requests that are here have been answered."""
        now = time.monotonic()
        return sum(max(job.share.rank(self._pace, now), 0.0) for job in [*self._waiting, *self._running.values()])

    def warm_up(self) -> None:
        """Answer dummy prompts, so that no request waits for kernels to be compiled."""
        for document, query in _WARM_UP:
            with suppress(InputError):  # too long for the model, or too short for its blocks
                self.engine.generate(Prompt((), (0,) * document, (0,) * query), max_new_tokens=3)

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Answer requests until ``stopped`` returns True on rank 0, where it is polled between pieces of work."""
        leads = self._everyone.rank == 0
        error: Exception | None = None
        last, state = -1, _GOES_ON
        while True:
            order = self._decide(stopped) if leads else (_NOTHING, -1)
            worst, kind, number = self._exchanged(state, *order)
            if worst == _FAILED and last in self._turns:  # on another rank alone
                self._turns.pop(last).cancel()
                state, error = _FAILED, RuntimeError("Another rank failed while it worked on this request.")
            if leads and state != _GOES_ON:
                self._over(last, error)
            last, state, error = -1, _GOES_ON, None
            if kind in (_WORK, _CANCEL) and number not in self._turns:
                continue
            if kind == _STOP:
                for turn in self._turns.values():
                    turn.cancel()
                while self.kept.documents.unwritten:
                    self.kept.write()
                return
            if kind == _WRITE:
                self.kept.write()
            if kind == _START:
                self._start(number)
            elif kind == _CANCEL:
                self._turns.pop(number).cancel()
                if leads:
                    self._over(number, Cancelled("The request was cancelled."))
            elif kind == _WORK:
                last, ended = number, self._work(number)
                if ended is not None:
                    del self._turns[number]
                    state, error = _ENDED if ended.error is None else _FAILED, ended.error

    # -- on rank 0 ---------------------------------------------------------------------------------------------------

    def _decide(self, stopped: Callable[[], bool]) -> tuple[int, int]:
        """What to do next, and with which request."""
        until = time.monotonic() + _HEARTBEAT_S
        while True:
            if stopped() or (self.draining and not self._waiting and not self._running):
                return _STOP, -1
            left = next((number for number, job in self._running.items() if job.cancelled.is_set()), None)
            if left is not None and left in self._turns:
                return _CANCEL, left
            with self._came:
                self._waiting = [job for job in self._waiting if not job.cancelled.is_set()]
                job = self._admitted()
                if job is not None:
                    self._waiting.remove(job)
                    self._count += 1
                    self._running[self._count] = job
                    return _START, self._count
                at_work = {id(self._running[number].share): number for number in self._turns}
                if at_work:
                    share = next_of((self._running[number].share for number in self._turns), self._pace)
                    return _WORK, at_work[id(share)]
                quiet = not self._running and time.monotonic() - self._ended > _QUIET_S
                if quiet and not self._settled:
                    self._settled = not self.kept.documents.unwritten
                    if not self._settled:
                        return _WRITE, -1
                if time.monotonic() > until or self._running:
                    return _NOTHING, -1
                self._came.wait(_PAUSE_S)

    def _admitted(self) -> Job | None:
        """The waiting request to begin with, if there is one that fits beside those that run."""
        if len(self._running) >= MOST_RUNNING:
            return None
        now = time.monotonic()
        taken = sum(job.bytes for job in self._running.values()) + self.kept.room
        read = [job.task.prompt.document for job in self._running.values() if not job.share.writing]
        for job in sorted(self._waiting, key=lambda job: job.share.rank(self._pace, now)):
            if not job.task.ordinary and job.task.prompt.document in read:
                continue  # it finds the document once that one has read it
            if not self._running or taken + job.bytes <= self.room:
                return job
            if now - job.share.since > _PATIENCE_S:  # it has waited long enough for smaller ones
                return None
        return None

    def _over(self, number: int, error: Exception | None) -> None:
        """A request has ended on all ranks."""
        job = self._running.pop(number, None)
        if job is None:
            return
        self._ended, self._settled = time.monotonic(), False
        if error is not None and not isinstance(error, (Cancelled, InputError)):
            self.last_error = noted(error)
        job.tell(error)

    # -- on all ranks ------------------------------------------------------------------------------------------------

    def _exchanged(self, state: int, kind: int, number: int) -> tuple[int, int, int]:
        """The worst state of all ranks, and rank 0's order."""
        if self._control is None:
            return state, kind, number
        mine = torch.tensor([state, kind, number])
        every = [torch.empty_like(mine) for _ in range(self._everyone.size)]
        dist.all_gather(every, mine, group=self._control)
        return max(int(each[0]) for each in every), int(every[0][1]), int(every[0][2])

    def _start(self, number: int) -> None:
        job = self._running.get(number)
        box = [None if job is None else (job.task, job.bytes + self.kept.room > self.room)]
        if self._control is not None:
            dist.broadcast_object_list(box, src=0, group=self._control)
        assert box[0] is not None, "rank 0 has the job"
        task, alone = box[0]
        if alone:
            self.kept.clear()
        tell: Callable[[Event], None] = job.tell if job is not None else lambda event: None
        share = job.share if job is not None else Share(0, 0)
        if job is not None and not task.ordinary:
            share.read = min(self.kept.read_of(task.prompt), share.to_read - 1)

        def work(pause: Callable[[], None]) -> None:
            answer(self, task, tell, share, pause)

        self._turns[number] = Turn(work, self.engine.device)

    def _work(self, number: int) -> Ended | None:
        """One piece of a request's work; on rank 0 what it took is noted."""
        job = self._running.get(number)
        if job is None:
            return self._turns[number].go_on()
        share, since = job.share, time.monotonic()
        was_writing, read = share.writing, share.read
        ended = self._turns[number].go_on()
        seconds = time.monotonic() - since
        share.worked_s += seconds
        if was_writing:
            share.owed = False
            self._pace.saw_written(seconds)
            return ended
        share.reading_s += seconds
        if read < share.read and not share.writing:  # what is found read takes no time, and is done at once
            self._pace.saw_read(share.read - read, seconds)
        for other in self._running.values():
            other.share.owed = other.share.writing and other is not job
        return ended

    def engine_of(self, task: Task) -> Any:
        """The engine that a request is read with."""
        return self.exact if task.ordinary else self.engine
