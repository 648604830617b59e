"""The server's worker: requests take turns with the model, each piece of work on all ranks together.

Rank 0 decides which request works next, and tells the others; a piece is one layer of a prefill, one token of an
answer, or one token of every answer that is being written, read in one pass. Every rank keeps the same requests and
goes through the same pieces in the same order.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..engine import Engine
from ..errors import Cancelled, InputError, unexpected
from ..prompt import Prompt
from ..session import extend_together
from .answers import Event, Task, answer, noted
from .fairness import Pace, Share, next_of
from .kept import KeptDocuments, Places
from .orders import APART, CANCEL, ENDED, FAILED, GOES_ON, MOST_RUNNING, NOTHING, START, STOP, WORK, WRITE, Orders
from .turns import Turn

# Length of the queue; further requests are refused, as they would wait for minutes at best.
MOST_WAITING = 64
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

# By request how its last piece of work ended, and the error, if there was one.
_Done = dict[int, tuple[int, Exception | None]]


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
        self._orders = Orders(self._everyone)
        self._came = threading.Condition()
        self._waiting: list[Job] = []
        self._running: dict[int, Job] = {}  # rank 0's
        self._turns: dict[int, Turn] = {}
        self._apart: set[int] = set()  # requests whose tokens a pass with others' has failed to read
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
        shares = [job.share for job in [*self._waiting, *self._running.values()]]
        return sum(share.reading_left_s(self._pace) + share.writing_left_s(self._pace) for share in shares)

    def warm_up(self) -> None:
        """Answer dummy prompts, so that no request waits for kernels to be compiled."""
        for document, query in _WARM_UP:
            with suppress(InputError):  # too long for the model, or too short for its blocks
                self.engine.generate(Prompt((), (0,) * document, (0,) * query), max_new_tokens=3)

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Answer requests until ``stopped`` returns True on rank 0, where it is polled between pieces of work."""
        leads = self._everyone.rank == 0
        done: _Done = {}
        while True:
            order = self._decide(stopped) if leads else (NOTHING, ())
            states, kind, numbers = self._orders.exchanged([state for state, _ in done.values()], *order)
            self._end(done, states)
            done = {}
            here = [number for number in numbers if number in self._turns]
            if kind == STOP:
                for turn in self._turns.values():
                    turn.cancel()
                while self.kept.documents.unwritten:
                    self.kept.write()
                return
            if kind == WRITE:
                self.kept.write()
            elif kind == START:
                self._start(numbers[0])
            elif kind == CANCEL and here:
                self._turns.pop(here[0]).cancel()
                self._over(here[0], Cancelled("The request was cancelled."))
            elif kind == WORK and here:
                done = self._work(here)

    # -- on rank 0 ---------------------------------------------------------------------------------------------------

    def _decide(self, stopped: Callable[[], bool]) -> tuple[int, Sequence[int]]:
        """What to do next, and with which requests."""
        until = time.monotonic() + _HEARTBEAT_S
        while True:
            if stopped() or (self.draining and not self._waiting and not self._running):
                return STOP, ()
            left = next((number for number, job in self._running.items() if job.cancelled.is_set()), None)
            if left is not None and left in self._turns:
                return CANCEL, [left]
            with self._came:
                self._waiting = [job for job in self._waiting if not job.cancelled.is_set()]
                job = self._admitted()
                if job is not None:
                    self._waiting.remove(job)
                    self._count += 1
                    self._running[self._count] = job
                    return START, [self._count]
                at_work = {id(self._running[number].share): number for number in self._turns}
                if at_work:
                    share = next_of((self._running[number].share for number in self._turns), self._pace)
                    return WORK, self._beside(at_work[id(share)])
                quiet = not self._running and time.monotonic() - self._ended > _QUIET_S
                if quiet and not self._settled:
                    self._settled = not self.kept.documents.unwritten
                    if not self._settled:
                        return WRITE, ()
                if time.monotonic() > until or self._running:
                    return NOTHING, ()
                self._came.wait(_PAUSE_S)

    def _beside(self, number: int) -> Sequence[int]:
        """This request, and those whose next tokens are read in one pass with its own."""
        turns = self._turns.items()
        waiting = [each for each, turn in turns if turn.unread is not None and turn.unread[0].why_alone is None]
        joining = [each for each in waiting if each not in self._apart]
        several = number in joining and len(joining) > 1
        return joining if several and self._pace.in_one_pass(len(joining)) else [number]

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
        self._apart.discard(number)
        job = self._running.pop(number, None)
        if job is None:
            return
        self._ended, self._settled = time.monotonic(), False
        if error is not None and not isinstance(error, (Cancelled, InputError)):
            self.last_error = noted(error)
        job.tell(error)

    # -- on all ranks ------------------------------------------------------------------------------------------------

    def _end(self, done: _Done, states: Sequence[int]) -> None:
        """Part with the requests that have ended in the last piece of work, by their states over all ranks."""
        for (number, (state, error)), agreed in zip(done.items(), states, strict=True):
            if agreed == FAILED and number in self._turns:  # on another rank alone
                self._turns.pop(number).cancel()
                self._over(number, RuntimeError("Another rank failed while it worked on this request."))
            elif state in (ENDED, FAILED):
                self._over(number, error)

    def _start(self, number: int) -> None:
        job = self._running.get(number)
        task, alone = self._orders.told(None if job is None else (job.task, job.bytes + self.kept.room > self.room))
        if alone:
            self.kept.clear()
        tell: Callable[[Event], None] = job.tell if job is not None else lambda event: None
        share = job.share if job is not None else Share(0, 0)
        if job is not None and not task.ordinary:
            share.read = min(self.kept.read_of(task.prompt), share.to_read - 1)

        def work(turn: Turn) -> None:
            answer(self, task, tell, share, turn)

        self._turns[number] = Turn(work, self.engine.device)

    def _work(self, numbers: Sequence[int]) -> _Done:
        """One piece of work, of one request or of several that write; on rank 0 what it took is noted."""
        shares = [self._running[number].share for number in numbers if number in self._running]
        since = time.monotonic()
        writing, read = [share.writing for share in shares], [share.read for share in shares]
        if len(numbers) > 1 and not self._read_together(numbers):
            return dict.fromkeys(numbers, (APART, None))
        done: _Done = {}
        for number in numbers:
            ended = self._turns[number].go_on()
            if ended is not None:
                del self._turns[number]
            error = None if ended is None else ended.error
            done[number] = GOES_ON if ended is None else ENDED if error is None else FAILED, error
        seconds = time.monotonic() - since
        for share in shares:
            share.worked_s += seconds
        if all(writing):
            self._wrote(shares, seconds)
        else:
            self._did_read(shares[0], read[0], seconds)
        return done

    def _read_together(self, numbers: Sequence[int]) -> bool:
        """Read the next tokens of requests in one pass; False if that failed and they are as they were."""
        turns = [self._turns[number] for number in numbers]
        unread = [turn.unread for turn in turns if turn.unread is not None]
        try:
            extend_together([session for session, _ in unread], [token for _, token in unread])
        except Exception as error:
            # Whoever caused it fails alone, when each reads its own.
            self._apart.update(numbers)
            if self._everyone.rank == 0:
                print(f"apb: {len(numbers)} answers go on one by one. {unexpected(error)}", file=sys.stderr, flush=True)
            return False
        for turn in turns:
            turn.unread = None
        return True

    def _wrote(self, shares: Sequence[Share], seconds: float) -> None:
        """A piece was a token of each of these answers."""
        if shares:
            self._pace.saw_written(seconds, len(shares))
        for share in shares:
            share.owed = False

    def _did_read(self, share: Share, read: int, seconds: float) -> None:
        """A piece was a part of a prompt, of which ``read`` tokens had been read before."""
        share.reading_s += seconds
        if read < share.read and not share.writing:  # what is found read takes no time, and is done at once
            self._pace.saw_read(share.read - read, seconds)
        for other in self._running.values():
            other.share.owed = other.share.writing and other.share is not share

    def engine_of(self, task: Task) -> Any:
        """The engine that a request is read with."""
        return self.exact if task.ordinary else self.engine
