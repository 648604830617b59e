"""Seconds by named part of the work, measured only inside :func:`clocked`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


class Clock:
    """Seconds by part; on a GPU, events on the current stream are read at the end, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._open: list[str] = []  # parts, the innermost last
        self._since: Any = None  # when that one began, or went on
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside towards a part, but for that inside parts within it."""
        self._turn()
        self._open.append(name)
        yield
        self._turn()
        self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds by part so far."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        for name, start, stop in self._spans:
            self._add(name, start.elapsed_time(stop) / 1e3)
        self._spans.clear()
        return dict(self._seconds)

    def _turn(self) -> None:
        """Count the time since the last turn towards the innermost part."""
        now: Any = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
        if self._cuda:
            now.record()
        if self._open and self._cuda:
            self._spans.append((self._open[-1], self._since, now))
        elif self._open:
            self._add(self._open[-1], now - self._since)
        self._since = now

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


@contextmanager
def clocked(device: torch.device) -> Iterator[Clock]:
    """Measure the parts of the work inside."""
    clock = Clock(device)
    token = _clock.set(clock)
    try:
        yield clock
    finally:
        _clock.reset(token)


def timed(name: str) -> AbstractContextManager[None]:
    """Count the time inside towards a part of the work, inside :func:`clocked`; that of a part within it is its own."""
    clock = _clock.get()
    return nullcontext() if clock is None else clock.part(name)
