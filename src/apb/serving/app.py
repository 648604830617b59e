"""The server's addresses: chat completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import Cancelled, InputError, NotFinite, unexpected
from ..generation import Generation, Sampling
from ..prompt import Prompt
from .schema import ChatRequest
from .worker import Event, Job, Progress, Worker

# Seconds between looks at whether a client that waits is still there, and between signs of life to one that streams.
_PULSE_S = 1.0
# Bounds of what seconds are counted by.
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Refusal(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Metrics:
    """What is counted, for Prometheus."""

    def __init__(self, worker: Worker) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("apb_requests", "Requests by HTTP status.", ["status"], registry=registry)
        self.prompt = Counter("apb_prompt_tokens", "Tokens of answered prompts.", registry=registry)
        self.answer = Counter("apb_answer_tokens", "Tokens of answers.", registry=registry)
        self.prefill = Histogram("apb_prefill_seconds", "To read a prompt.", buckets=_SECONDS, registry=registry)
        self.decode = Histogram("apb_decode_seconds", "To answer after that.", buckets=_SECONDS, registry=registry)
        waiting = Gauge("apb_waiting_requests", "Requests not begun.", registry=registry)
        waiting.set_function(lambda: worker.waiting)

    def count(self, prompt: Prompt, result: Generation) -> None:
        """Count an answer."""
        self.prompt.inc(len(prompt))
        self.answer.inc(len(result.token_ids))
        self.prefill.observe(result.timing["prefill_s"])
        self.decode.observe(result.timing["decode_s"])


class Counted:
    """Counts what the API answers, by status. Plain ASGI: what wraps responses hides clients that go away."""

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"].startswith("/v1/"):
                self._requests.labels(message["status"]).inc()
            await send(message)

        await self._app(scope, receive, watched)


def make_app(worker: Worker, name: str, max_new_tokens: int, chat_template: str | None = None) -> FastAPI:
    """The server of one model.

    Args:
        worker: rank 0's; its :meth:`~apb.serving.worker.Worker.run` must be running on another thread.
        name: what clients call the model.
        max_new_tokens: an answer's longest length where a request names none.
        chat_template: as in :meth:`apb.Prompt.from_chat`.
    """
    app = FastAPI(title="apb", docs_url=None, redoc_url=None)
    metrics = Metrics(worker)
    app.add_middleware(Counted, requests=metrics.requests)
    served = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "apb"}
    tokenizing = threading.Lock()  # fast tokenizers are not made for several threads

    def check_name(asked: str) -> None:
        if asked != name:
            raise Refusal(404, f"The model {asked!r} is not served here; ask for {name!r}.", code="model_not_found")

    def make_prompt(body: ChatRequest) -> tuple[Prompt, dict[str, Any]]:
        """What to read and how to answer; InputError where that cannot be done."""
        document, query, system = body.parts()
        sampling = body.sampling(max_new_tokens)
        Sampling(**sampling)
        tokenizer = worker.engine.tokenizer
        assert tokenizer is not None, "from_pretrained loads one"
        with tokenizing:
            prompt = Prompt.for_model(tokenizer, document, query, system, chat_template=chat_template)
        worker.engine.plan(prompt, sampling["max_new_tokens"])
        return prompt, sampling

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        if body.model is not None:
            check_name(body.model)
        prompt, sampling = await run_in_threadpool(make_prompt, body)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        job = Job(prompt, sampling, lambda event: _tell(loop, events, event))
        if not worker.submit(job):
            raise Refusal(503, f"{worker.waiting} requests are waiting; try again later.", "server_error", "overloaded")
        reply = Reply(name, prompt)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            pieces = _streamed(job, events, reply, metrics, usage)
            return StreamingResponse(pieces, media_type="text/event-stream")
        try:
            result = await _result(events, request)
        finally:
            job.cancelled.set()
        metrics.count(prompt, result)
        return JSONResponse(reply.whole(result))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{asked:path}")
    async def model(asked: str) -> dict[str, Any]:
        check_name(asked)
        return served

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def counted() -> Response:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body, refusal.status)

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> Response:
        return JSONResponse(Refusal(400, str(error)).body, 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(Refusal(400, _sentence(error)).body, 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(Refusal(error.status_code, message).body, error.status_code)

    return app


class Reply:
    """The bodies of one answer."""

    def __init__(self, model: str, prompt: Prompt) -> None:
        self._prompt = prompt
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, result: Generation) -> dict[str, Any]:
        """All of it."""
        message = {"role": "assistant", "content": result.text}
        choice = {"index": 0, "message": message, "finish_reason": result.finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], **self.figures(result)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
        """A piece of a streamed one."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _sse({**self._head, "object": "chat.completion.chunk", "choices": [choice], **more})

    def usage(self, result: Generation) -> str:
        """The last piece of a streamed one, where it was asked for."""
        figures = {"usage": self.figures(result)["usage"]}
        return _sse({**self._head, "object": "chat.completion.chunk", "choices": [], **figures})

    def figures(self, result: Generation) -> dict[str, Any]:
        """Tokens, and under "apb" how the prompt was read: whether exactly, by which plan, in what time."""
        read, written = len(self._prompt), len(result.token_ids)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        kept = ("strategy", "exact", "plan", "timing", "choice", "notes")
        return {"usage": usage, "apb": {key: value for key, value in result.to_dict().items() if key in kept}}


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """From the worker's thread to the server's, which may have gone."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _result(events: asyncio.Queue[Event], request: Request) -> Generation:
    """The end of a job; Refusal where it failed, or the client went away."""
    while True:
        try:
            event = await asyncio.wait_for(events.get(), _PULSE_S)
        except TimeoutError:
            if await request.is_disconnected():
                raise Refusal(499, "The client went away.", code="cancelled") from None
            continue
        if isinstance(event, Generation):
            return event
        if isinstance(event, Exception):
            raise _failure(event)


async def _streamed(
    job: Job, events: asyncio.Queue[Event], reply: Reply, metrics: Metrics, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events; while nothing can be said yet, comments that tell how far reading is."""
    read = "waiting"
    told = 0.0
    try:
        yield reply.chunk({"role": "assistant", "content": ""})
        while True:
            try:
                event = await asyncio.wait_for(events.get(), _PULSE_S)
            except TimeoutError:
                yield f": {read}\n\n"
                continue
            if isinstance(event, str):
                yield reply.chunk({"content": event})
            elif isinstance(event, Progress):
                read = f"read {event.done} of {event.total} tokens"
                if time.monotonic() - told > _PULSE_S:
                    told = time.monotonic()
                    yield f": {read}\n\n"
            elif isinstance(event, Generation):
                metrics.count(job.prompt, event)
                yield reply.chunk({}, event.finish_reason, apb=reply.figures(event)["apb"])
                if usage:
                    yield reply.usage(event)
                break
            else:
                yield _sse(_failure(event).body)
                break
        yield "data: [DONE]\n\n"
    finally:  # the client may have gone
        job.cancelled.set()


def _failure(error: Exception) -> Refusal:
    """What a client is told of a job that went wrong after it had been taken."""
    if isinstance(error, InputError):
        return Refusal(400, str(error))
    if isinstance(error, Cancelled):
        return Refusal(499, str(error), code="cancelled")
    return Refusal(500, str(error) if isinstance(error, NotFinite) else unexpected(error), "server_error")


def _sentence(error: RequestValidationError) -> str:
    """What is wrong with a body, in the deepest place: what is no text may be pieces of text, one of them wrong."""
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    # Beside names of fields and places in lists these are the types that a value might have been.
    parts = [part for part in first["loc"][1:] if part not in ("str", "int") and "[" not in str(part)]
    where = ".".join(map(str, parts))
    if first["type"] == "json_invalid":
        return "The request's body is not JSON."
    if first["type"] == "extra_forbidden":
        return f"{where!r} is not supported here; leave it out."
    return f"The request's {where or 'body'} is wrong: {first['msg'].rstrip('.')}."


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
