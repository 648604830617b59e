"""Requests that take turns with one model: each on a thread of its own, of which one works at a time."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import Cancelled
from ..session import Session

# glibc's; other libraries of C have none, and keep less.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
# What a request does; it pauses wherever another request may work.
Work = Callable[["Turn"], None]


@dataclass
class Ended:
    """How a request ended: with an error, or None."""

    error: Exception | None


class Turn:
    """A request on this rank. It works while :meth:`go_on` is waiting, from one of its pauses to the next.

    A pass of a model cannot be left and entered again, so a request that stops in the middle of one, between two
    layers, needs a stack of its own: a thread.

    Attributes:
        unread: a session and the token that the request is to read next, while it waits to; whoever reads it meanwhile,
            with those of other requests, sets it to None.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work = work
        self._device = device
        self._threads = torch.get_num_threads()
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._ended: Ended | None = None
        self._cancelled = False
        self.unread: tuple[Session, int] | None = None
        self._queued: list[Any] = []
        threading.Thread(target=self._run, daemon=True).start()

    def go_on(self) -> Ended | None:
        """Let the request work until its next pause; how it ended, if it did."""
        self._mine.release()
        self._others.acquire()
        return self._ended

    def cancel(self) -> None:
        """End the request, from within its pause; what it had is freed when this returns."""
        self._cancelled = True
        while self.go_on() is None:
            pass

    def read(self, session: Session, token: int) -> None:
        """Have a session read a token, after a pause: alone, unless it has been read by then."""
        self.unread = session, token
        self.pause()
        if self.unread is not None:
            self.unread = None
            session.extend([token])

    def _run(self) -> None:
        self._mine.acquire()
        error: Exception | None = None
        try:
            if not self._cancelled:
                torch.set_num_threads(self._threads)  # of this thread alone, and new ones take all cores
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                self._work(self)
        except Exception as raised:
            error = raised
            # The frames hold the caches of what has failed.
            error.__traceback__ = None
        finally:
            self._ended = Ended(error)
            del self._work
            self.unread = None
            if _trim is not None:
                # Each thread has a heap of its own, and what is freed in it stays in it: gigabytes after long texts.
                _trim(0)
            self._others.release()

    def pause(self) -> None:
        """Let others work until this request's next turn; raises :class:`apb.Cancelled` if there is none."""
        if self._device.type == "cuda":
            self._wait_for_the_last_but_one()
        self._others.release()
        self._mine.acquire()
        if self._cancelled:
            raise Cancelled("The request was cancelled.")

    def _wait_for_the_last_but_one(self) -> None:
        """Let the GPU be at most one piece behind: work that is queued can be neither overtaken nor cancelled."""
        event = torch.cuda.Event()
        event.record()
        self._queued.append(event)
        if len(self._queued) > 1:
            self._queued.pop(0).synchronize()
