"""The ranks as the HTTP server sees them: requests go to rank 0 over a pipe, and what happens to them comes back.

The server lives in the process that started the ranks. It holds no weights, does not share Python's lock with the
model, and outlives ranks that are lost.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from .alive import PATIENCE_S
from .answers import Event, Lost, Task
from .messages import Cancel, Drain, Facts, Happened, KeptFigures, State, Submit, Taken
from .replies import AGAIN_S, Refusal, failure

_LOST = "A rank was lost while it worked on this request; the ranks are being started again."


class Job:
    """A request that was sent to the ranks; ``tell`` is called with every event, on one thread."""

    def __init__(self, ranks: Ranks, number: int, tell: Callable[[Event], None]) -> None:
        self.tell = tell
        self._ranks, self._number = ranks, number

    def cancel(self) -> None:
        """End the request; nothing happens if it has ended."""
        self._ranks.cancel(self._number)


class Ranks:
    """A group of ranks, and the next one whenever it is lost.

    Attributes:
        facts: what the group at work has said of itself; None while there is none that can answer.
        served: True once the last group was ready.
        draining: True once no further requests are taken.
        last_error: the last failure that was not a client's.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self.facts: Facts | None = None
        self.served = self.draining = False
        self.last_error: str | None = None
        self._patience_s = patience_s
        self._state = State()
        self._jobs: dict[int, Job] = {}
        self._asked: dict[int, asyncio.Future[Exception | bool]] = {}
        self._count = 0
        self._lock = threading.Lock()
        # SimpleQueue: a signal may interrupt one message with another.
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._listener: threading.Thread | None = None
        self._theirs: Connection | None = None

    # -- what the app asks -------------------------------------------------------------------------------------------

    async def submit(self, task: Task, tell: Callable[[Event], None]) -> Job | None:
        """Queue a request; None if the queue is full.

        Raises:
            Refusal: it can never be answered, or there are no ranks at the moment.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            if self.facts is None:
                later = {"Retry-After": str(AGAIN_S)}
                raise Refusal(503, "The ranks are being started; ask again soon.", "server_error", "starting", later)
            self._count += 1
            number = self._count
            job = self._jobs[number] = Job(self, number, tell)
            asked = self._asked[number] = loop.create_future()
        self._outbox.put(Submit(number, task))
        try:
            taken = await asked
        except asyncio.CancelledError:
            self.cancel(number)
            raise
        if isinstance(taken, Exception):
            raise failure(taken)
        return job if taken else None

    def cancel(self, number: int) -> None:
        """End a request."""
        with self._lock:
            known = number in self._jobs
        if known:
            self._outbox.put(Cancel(number))

    @property
    def ready(self) -> bool:
        """True if requests are taken."""
        return self.facts is not None and not self.draining

    @property
    def own_sampling(self) -> dict[str, Any]:
        """How the checkpoint samples where a request does not say."""
        return {} if self.facts is None else self.facts.sampling

    @property
    def waiting(self) -> int:
        """Number of queued requests, a second ago at most."""
        return self._state.waiting

    @property
    def running(self) -> int:
        """Number of requests that are being read or answered."""
        return self._state.running

    @property
    def kept(self) -> KeptFigures:
        """What stays read."""
        return self._state.kept

    def wait_s(self) -> float:
        """Predicted seconds until the requests that are here have been answered."""
        return self._state.wait_s

    # -- what the process that starts them does ----------------------------------------------------------------------

    def connect(self, ready: Callable[[Facts], None]) -> Connection:
        """The other end of the pipe, for rank 0 of a new group; ``ready`` is called once that can answer."""
        ours, self._theirs = Pipe()
        self.served = False
        outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._outbox = outbox
        self._listener = threading.Thread(target=self._listen, args=(ours, outbox, ready), daemon=True)
        self._listener.start()
        return self._theirs

    def disconnect(self) -> None:
        """The group has ended: whatever it has not answered has failed."""
        if self._theirs is not None and self._listener is not None:
            with socket.socket(fileno=os.dup(self._theirs.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)  # whoever else has a copy of it
            self._theirs.close()
            self._listener.join(self._patience_s)  # what the ranks had sent is heard first

    def drain(self) -> None:
        """Take no further requests; the ranks end once those that are here have been answered."""
        self.draining = True
        self._outbox.put(Drain())

    # -- on threads --------------------------------------------------------------------------------------------------

    def _listen(self, pipe: Connection, outbox: queue.SimpleQueue[object], ready: Callable[[Facts], None]) -> None:
        """Hear rank 0 until its end of the pipe is closed; one that falls silent is killed."""
        sender = threading.Thread(target=_send, args=(pipe, outbox), daemon=True)
        sender.start()
        with suppress(EOFError, OSError):
            while True:
                facts = self.facts
                if facts is not None and not pipe.poll(self._patience_s):
                    os.kill(facts.pid, signal.SIGKILL)
                    pipe.poll(None)
                self._hear(pipe.recv(), ready)
        outbox.put(None)
        sender.join()
        pipe.close()
        self._lost()

    def _hear(self, message: object, ready: Callable[[Facts], None]) -> None:
        if isinstance(message, Happened):
            with self._lock:
                over = message.event is None or isinstance(message.event, Exception)
                job = (self._jobs.pop if over else self._jobs.get)(message.number, None)
            if job is not None:
                job.tell(message.event)
        elif isinstance(message, Taken):
            self._note(message.state)
            with self._lock:
                asked = self._asked.pop(message.number, None)
                if message.taken is not True:
                    self._jobs.pop(message.number, None)
            if asked is not None:
                _settle(asked, message.taken)
        elif isinstance(message, State):
            self._note(message)
        elif isinstance(message, Facts):
            self.facts, self.served = message, True
            ready(message)

    def _note(self, state: State) -> None:
        self._state = state
        self.last_error = state.last_error or self.last_error

    def _lost(self) -> None:
        with self._lock:
            self.facts, self._state = None, State()
            jobs = [job for number, job in self._jobs.items() if number not in self._asked]
            asked = list(self._asked.values())
            self._jobs.clear()
            self._asked.clear()
        for future in asked:
            _settle(future, Lost(_LOST))
        for job in jobs:
            job.tell(Lost(_LOST))


def _send(pipe: Connection, outbox: queue.SimpleQueue[object]) -> None:
    with suppress(OSError):  # the other end is gone, which the listener sees too
        while (message := outbox.get()) is not None:
            pipe.send(message)


def _settle(future: asyncio.Future[Exception | bool], value: Exception | bool) -> None:
    def settle() -> None:
        if not future.done():
            future.set_result(value)

    with suppress(RuntimeError):  # the server has ended
        future.get_loop().call_soon_threadsafe(settle)
