"""Following a request from the worker's threads on the server's event loop, for a client that may leave at any time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request

from ..errors import Cancelled
from ..generation import Generation
from .answers import Answer, Cancellable, Event, Passed, Progress, Written
from .metrics import Metrics
from .replies import Refusal, Reply, failure, sse

# Seconds between keep-alive comments to a streaming client.
_PULSE_S = 1.0


class Following:
    """One request's events; ``heard`` is called with each of them as well, on a thread of the worker's.

    Attributes:
        job: the request, once it is queued.
        tokens: how many have been read and written, counted as answers are complete.
    """

    def __init__(self, reply: Reply, metrics: Metrics, heard: Callable[[Event], None] | None = None) -> None:
        self.job: Cancellable | None = None
        self.tokens = [0, 0]
        self._reply, self._metrics, self._heard = reply, metrics, heard
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._begun = False
        self._last: float | None = None
        self._since = time.monotonic()

    def tell(self, event: Event) -> None:
        """Take an event on a thread of the worker's."""
        if not self._begun and not isinstance(event, Exception):
            self._begun = True
            self._metrics.queued.observe(time.monotonic() - self._since)
        if isinstance(event, Written):
            now = time.monotonic()
            if self._last is None:
                self._metrics.first.observe(now - self._since)
            else:
                self._metrics.between.observe(now - self._last)
            self._last = now
        elif isinstance(event, Answer):
            self._metrics.count(event)
            self.tokens[:] = event.result.prompt_tokens, self.tokens[1] + len(event.result.token_ids)
        elif isinstance(event, Exception) and not isinstance(event, Cancelled):
            self._metrics.failed.labels(type(event).__name__).inc()
        if self._heard is not None:
            self._heard(event)
        if not isinstance(event, Passed) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def leave(self) -> None:
        """The client waits no longer."""
        if self.job is not None:
            self.job.cancel()

    async def whole(self, request: Request) -> dict[str, Any]:
        """The body with all answers; Refusal if the request failed or the client disconnected."""
        gone = asyncio.ensure_future(_disconnected(request))
        done = asyncio.ensure_future(self._results())
        try:
            await asyncio.wait((gone, done), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise Refusal(499, "The client disconnected.", code="cancelled")
            return self._reply.whole(done.result())
        finally:
            gone.cancel()
            done.cancel()
            self.leave()

    async def _results(self) -> list[Generation]:
        results = []
        while (event := await self._events.get()) is not None:
            if isinstance(event, Answer):
                results.append(event.result)
            elif isinstance(event, Exception):
                raise failure(event)
        return results

    async def streamed(self, answers: int, usage: bool) -> AsyncIterator[str]:
        """Server-sent events; until the first token, comments with the progress of prefill."""
        read, told = "waiting", 0.0
        results: list[Generation] = []
        try:
            for index in range(answers):
                if (opening := self._reply.first(index)) is not None:
                    yield opening
            while True:
                try:
                    event = await asyncio.wait_for(self._events.get(), _PULSE_S)
                except TimeoutError:
                    yield f": {read}\n\n"
                    continue
                if isinstance(event, Written):
                    yield self._reply.text(event.index, event.text, event.scored)
                elif isinstance(event, Progress):
                    read = f"read {event.done} of {event.total} tokens"
                    if time.monotonic() - told > _PULSE_S:
                        told = time.monotonic()
                        yield f": {read}\n\n"
                elif isinstance(event, Answer):
                    results.append(event.result)
                    yield self._reply.last(event.index, event.result)
                elif isinstance(event, Exception):
                    yield sse(failure(event).body)
                    break
                else:
                    if usage:
                        yield self._reply.usage(results)
                    break
            yield "data: [DONE]\n\n"
        finally:
            self.leave()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
