"""Seconds by named part of the work, measured only inside :func:`clocked`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


class Clock:
    """Seconds by part; on a GPU, events on the current stream are read at the end, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside towards a part."""
        if self._cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._spans.append((name, start, stop))
        else:
            began = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - began)

    def seconds(self) -> dict[str, float]:
        """Seconds by part so far."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        for name, start, stop in self._spans:
            self._add(name, start.elapsed_time(stop) / 1e3)
        self._spans.clear()
        return dict(self._seconds)

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
    """Count the time inside towards a part of the work, inside :func:`clocked`; parts must not be nested."""
    clock = _clock.get()
    return nullcontext() if clock is None else clock.part(name)
