"""The server's endpoints: chat completions, models, health and metrics."""

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

# Seconds between checks that a waiting client is still connected, and between keep-alive comments to a streaming one.
_PULSE_S = 1.0
# Bucket bounds of the histograms, in seconds.
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Refusal(Exception):
    """An error response: HTTP status and an error object in OpenAI's format."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Metrics:
    """Counters and histograms for Prometheus."""

    def __init__(self, worker: Worker) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("apb_requests", "Requests by HTTP status.", ["status"], registry=registry)
        self.prompt = Counter("apb_prompt_tokens", "Tokens of answered prompts.", registry=registry)
        self.answer = Counter("apb_answer_tokens", "Tokens of answers.", registry=registry)
        self.prefill = Histogram("apb_prefill_seconds", "Seconds of prefill.", buckets=_SECONDS, registry=registry)
        self.decode = Histogram("apb_decode_seconds", "Seconds of decode.", buckets=_SECONDS, registry=registry)
        waiting = Gauge("apb_waiting_requests", "Requests in the queue.", registry=registry)
        waiting.set_function(lambda: worker.waiting)

    def count(self, result: Generation) -> None:
        """Record an answered request."""
        self.prompt.inc(result.prompt_tokens)
        self.answer.inc(len(result.token_ids))
        self.prefill.observe(result.timing["prefill_s"])
        self.decode.observe(result.timing["decode_s"])


class Counted:
    """Middleware that counts API responses by status; plain ASGI, since response wrappers hide client disconnects."""

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
    """The server application for one model.

    Args:
        worker: rank 0's worker; its :meth:`~apb.serving.worker.Worker.run` must be running on another thread.
        name: the model's name in the API.
        max_new_tokens: limit on an answer's tokens for requests that set none.
        chat_template: as in :meth:`apb.Prompt.from_chat`.
    """
    app = FastAPI(title="apb", docs_url=None, redoc_url=None)
    metrics = Metrics(worker)
    app.add_middleware(Counted, requests=metrics.requests)
    served = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "apb"}
    tokenizing = threading.Lock()  # fast tokenizers are not thread-safe

    def check_name(asked: str) -> None:
        if asked != name:
            raise Refusal(404, f"The model {asked!r} is not served here; ask for {name!r}.", code="model_not_found")

    def make_prompt(body: ChatRequest) -> tuple[Prompt, dict[str, Any]]:
        """Prompt and sampling options of a request; InputError if they are invalid or do not fit."""
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
        reply = Reply(name)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            pieces = _streamed(job, events, reply, metrics, usage)
            return StreamingResponse(pieces, media_type="text/event-stream")
        try:
            result = await _result(events, request)
        finally:
            job.cancelled.set()
        metrics.count(result)
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
    """Response bodies of one answer."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, result: Generation) -> dict[str, Any]:
        """Body of a whole answer."""
        message = {"role": "assistant", "content": result.text}
        choice = {"index": 0, "message": message, "finish_reason": result.finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], **self.figures(result)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
        """Server-sent event with a piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _sse({**self._head, "object": "chat.completion.chunk", "choices": [choice], **more})

    def usage(self, result: Generation) -> str:
        """Server-sent event with the token usage, the last of a streamed answer if requested."""
        figures = {"usage": self.figures(result)["usage"]}
        return _sse({**self._head, "object": "chat.completion.chunk", "choices": [], **figures})

    def figures(self, result: Generation) -> dict[str, Any]:
        """Token usage, and under "apb" how the prompt was read and the answer decoded, whether exactly, and notes."""
        read, written = result.prompt_tokens, len(result.token_ids)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        kept = ("strategy", "exact", "plan", "timing", "decode", "choice", "read_for", "notes")
        return {"usage": usage, "apb": {key: value for key, value in result.to_dict().items() if key in kept}}


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Hand an event from the worker's thread to the server's event loop, which may be closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _result(events: asyncio.Queue[Event], request: Request) -> Generation:
    """Wait for a job's result; Refusal if it failed or the client disconnected."""
    while True:
        try:
            event = await asyncio.wait_for(events.get(), _PULSE_S)
        except TimeoutError:
            if await request.is_disconnected():
                raise Refusal(499, "The client disconnected.", code="cancelled") from None
            continue
        if isinstance(event, Generation):
            return event
        if isinstance(event, Exception):
            raise _failure(event)


async def _streamed(
    job: Job, events: asyncio.Queue[Event], reply: Reply, metrics: Metrics, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of a job; until the first token, comments with the progress of prefill."""
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
                metrics.count(event)
                yield reply.chunk({}, event.finish_reason, apb=reply.figures(event)["apb"])
                if usage:
                    yield reply.usage(event)
                break
            else:
                yield _sse(_failure(event).body)
                break
        yield "data: [DONE]\n\n"
    finally:  # the client may have disconnected
        job.cancelled.set()


def _failure(error: Exception) -> Refusal:
    """The error response for a job that failed after it was accepted."""
    if isinstance(error, InputError):
        return Refusal(400, str(error))
    if isinstance(error, Cancelled):
        return Refusal(499, str(error), code="cancelled")
    return Refusal(500, str(error) if isinstance(error, NotFinite) else unexpected(error), "server_error")


def _sentence(error: RequestValidationError) -> str:
    """One sentence for the most deeply nested validation error: a union reports one for each of its types."""
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    # Besides field names and list indices, locations contain the types of a union.
    parts = [part for part in first["loc"][1:] if part not in ("str", "int") and "[" not in str(part)]
    where = ".".join(map(str, parts))
    if first["type"] == "json_invalid":
        return "The request's body is not JSON."
    if first["type"] == "extra_forbidden":
        return f"{where!r} is not supported here; leave it out."
    return f"The request's {where or 'body'} is wrong: {first['msg'].rstrip('.')}."


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
