"""Rank 0's end of the pipe to the HTTP server."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from ..hf.sampling import own_sampling
from .answers import Event, travelling
from .messages import Cancel, Drain, Facts, Happened, State, Submit, Taken
from .worker import Job, Worker

# Seconds between signs of life to the server.
_PULSE_S = 1.0


def _alone() -> None:
    """Nobody is there to answer: whoever started the ranks has gone, and they end."""
    os._exit(1)


class Desk:
    """Takes requests for a worker, and sends what happens to them."""

    def __init__(self, worker: Worker, pipe: Connection, gone: Callable[[], None] = _alone) -> None:
        """Make one; :meth:`open` begins.

        Args:
            worker: answers.
            pipe: the end for rank 0, see :meth:`apb.serving.ranks.Ranks.connect`.
            gone: called once the other end is closed.
        """
        self._worker, self._pipe, self._gone = worker, pipe, gone
        self._jobs: dict[int, Job] = {}
        self._over = threading.Event()
        self._sending, self._taking = threading.Lock(), threading.Lock()

    def open(self) -> None:
        """Say that the ranks can answer, and take requests from now on, on threads."""
        engine = self._worker.engine
        self._send(Facts(os.getpid(), engine.group.size, own_sampling(engine.model)))
        for run in (self._listen, self._pulse):
            threading.Thread(target=run, daemon=True).start()

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                message = self._pipe.recv()
                if isinstance(message, Submit):
                    self._send(Taken(message.number, self._submit(message), self._state()))
                elif isinstance(message, Cancel) and (job := self._jobs.get(message.number)) is not None:
                    job.cancel()
                elif isinstance(message, Drain):
                    self._worker.draining = True
        self._over.set()
        self._gone()

    def _submit(self, asked: Submit) -> bool | Exception:
        def tell(event: Event) -> None:
            if event is None or isinstance(event, Exception):
                with self._taking:  # it may be over before it is known here
                    del self._jobs[asked.number]
                event = None if event is None else travelling(event)
                self._send(self._state())
            self._send(Happened(asked.number, event))

        try:
            with self._taking:
                job = self._worker.submit(asked.task, tell)
                if job is not None:
                    self._jobs[asked.number] = job
        except Exception as error:
            return travelling(error)
        return job is not None

    def _pulse(self) -> None:
        while not self._over.wait(_PULSE_S):
            self._send(self._state())

    def _state(self) -> State:
        worker = self._worker
        return State(worker.waiting, worker.running, worker.wait_s(), worker.last_error, worker.kept.told)

    def _send(self, message: object) -> None:
        # If the other end is gone, the thread that listens learns of it.
        with self._sending, suppress(OSError):
            self._pipe.send(message)
