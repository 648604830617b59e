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

# glibc's; other libraries of C have none, and keep less.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
# What a request may do: it is given the function to call wherever another request may work.
Work = Callable[[Callable[[], None]], None]


@dataclass
class Ended:
    """How a request ended: with an error, or None."""

    error: Exception | None


class Turn:
    """A request on this rank. It works while :meth:`go_on` is waiting, from one of its pauses to the next.

    A pass of a model cannot be left and entered again, so a request that stops in the middle of one, between two
    layers, needs a stack of its own: a thread.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work = work
        self._device = device
        self._threads = torch.get_num_threads()
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._ended: Ended | None = None
        self._cancelled = False
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

    def _run(self) -> None:
        self._mine.acquire()
        error: Exception | None = None
        try:
            if not self._cancelled:
                torch.set_num_threads(self._threads)  # of this thread alone, and new ones take all cores
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                self._work(self._pause)
        except Exception as raised:
            error = raised
            # The frames hold the caches of what has failed.
            error.__traceback__ = None
        finally:
            self._ended = Ended(error)
            del self._work
            if _trim is not None:
                # Each thread has a heap of its own, and what is freed in it stays in it: gigabytes after long texts.
                _trim(0)
            self._others.release()

    def _pause(self) -> None:
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
