"""The server's endpoints: chats, completions, documents, models, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from ..errors import InputError
from ..generation import Sampling
from ..hf.chat import template_of
from . import bodies
from .answers import Event, Task
from .description import LOOK, WORK, describe, errors, streamed
from .following import Following
from .forwarding import Forwarding
from .limits import Gate, most_characters, plain
from .metrics import Metrics
from .page import add_page
from .prompts import Asked, Said
from .ranks import Ranks
from .replies import Refusal, Reply, TextReply
from .schema import ChatRequest, CompletionRequest, DocumentRequest
from .shelf import Shelf
from .tokenizing import Tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Seconds after which a client that was told to come again later should, at most.
_LATER_S = 600


def make_app(
    ranks: Ranks,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    max_new_tokens: int,
    chat_template: str | None = None,
    keys: Collection[str] = (),
    shelf: Shelf | None = None,
    forwarding: Forwarding | None = None,
    origins: Collection[str] = (),
    may_ask_exact: bool = False,
) -> FastAPI:
    """The server application for one model.

    Args:
        ranks: they answer.
        name: the model's name in the API.
        tokenizer: the model's.
        positions: tokens that the model can read; None if any number.
        max_new_tokens: limit on an answer's tokens for requests that set none.
        chat_template: as in :meth:`apb.Prompt.from_chat`.
        keys: API keys, one of which every request under /v1 must bring; none: anybody is served.
        shelf: the documents that clients give; None: one in memory alone.
        forwarding: takes requests instead of the ranks, if another server answers.
        origins: web pages of these origins may ask, "*" for all.
        may_ask_exact: requests may ask to be read exactly, with ``{"apb": {"exact": true}}``.
    """

    @asynccontextmanager
    async def lifetime(app: FastAPI) -> AsyncIterator[None]:
        yield
        tokenizing.close()

    app = FastAPI(title="apb", docs_url=None, redoc_url=None, lifespan=lifetime)
    describe(app, bool(keys))
    metrics, characters = Metrics(ranks), most_characters(positions)
    app.add_middleware(Gate, requests=metrics.requests, characters=characters, keys=keys)
    if origins:  # around the gate: a browser asks first, without a key, and reads refusals too
        told = ("X-Request-Id", "X-APB-Warning", "Retry-After")
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=told
        )
    served: dict[str, Any] = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "apb"}
    served["turns"] = template_of(tokenizer, chat_template) is not None  # else it takes one message alone
    tokenizing = Tokenizing(tokenizer, chat_template, characters)
    shelf = shelf or Shelf()
    submit = ranks.submit if forwarding is None else forwarding.submit

    add_page(app)

    def check_name(asked: str | None) -> None:
        if asked not in (None, name):
            raise Refusal(404, f"The model {asked!r} is not served here; ask for {name!r}.", code="model_not_found")

    async def submitted(task: Task, following: Following) -> None:
        """Queue a request, or refuse it."""
        if ranks.draining:
            raise Refusal(503, "The server is ending; ask another one.", "server_error", "ending")
        following.job = await submit(task, following.tell)
        if following.job is None:
            later = {"Retry-After": str(min(max(int(ranks.wait_s()), 1), _LATER_S))}
            message = f"{ranks.waiting} requests are waiting; try again later."
            raise Refusal(429, message, "server_error", "overloaded", later)

    async def answered(
        body: ChatRequest | CompletionRequest,
        asked: Asked,
        request: Request,
        kind: type[Reply],
        heard: Callable[[Event], None] | None = None,
    ) -> Response:
        sampling = body.sampling(max_new_tokens, ranks.own_sampling)
        # What is wrong with it is said before anything is queued. To look at a schema may take a while.
        await asyncio.to_thread(lambda: Sampling(**sampling))
        if body.exactly and not may_ask_exact:
            raise InputError("'apb': {'exact': true} is not allowed on this server; leave it out.")
        task = Task(asked.prompt, sampling, body.n, asked.ordinary or body.exactly)
        following = Following(kind(name, {"question": asked.question}, tokenizing.name), metrics, heard)
        request.scope["state"]["tokens"] = following.tokens
        await submitted(task, following)
        warned = {"X-APB-Warning": plain(f"ignored: {', '.join(body.ignored)}"[:500])} if body.ignored else {}
        if body.stream:
            pieces = following.streamed(body.n, body.with_usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers=warned)
        return JSONResponse(await following.whole(request), headers=warned)

    @app.post("/v1/chat/completions", response_model=bodies.ChatCompletion, responses=streamed(bodies.ChatChunk))
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_name(body.model)
        said, kept = body.said(), None if body.document_id is None else shelf[body.document_id]
        asked = await tokenizing.chat(said, body.document if kept is None else kept.text)
        heard = None if kept is None else partial(shelf.overheard, kept, asked, said[-1].text)
        return await answered(body, asked, request, Reply, heard)

    @app.post("/v1/completions", response_model=bodies.TextCompletion, responses=streamed(bodies.TextCompletion))
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check_name(body.model)
        return await answered(body, await tokenizing.plain(body.text), request, TextReply)

    @app.post("/v1/documents", status_code=202, response_model=bodies.DocumentBody, responses=errors(WORK))
    async def read(body: DocumentRequest) -> dict[str, Any]:
        from ..asking import NEUTRAL

        asked = await tokenizing.chat([Said("user", [body.question or NEUTRAL])], body.text)
        kept = shelf.put(body.text, body.name, body.question, asked.prompt)

        def heard(event: Event) -> None:
            kept.passes(asked, body.question, event)
            shelf.heard(kept, event)

        if body.read and kept.job is None:
            kept.status = "reading"
            following = Following(Reply(name, {}, tokenizing.name), metrics, heard)
            try:
                await submitted(Task(asked.prompt, answers=0), following)
            except (Refusal, InputError):
                shelf.remove(kept.id)
                raise
            if kept.status == "reading":  # it may have failed by now
                kept.job = following.job
        return kept.told()

    @app.get("/v1/documents", response_model=bodies.DocumentList, responses=errors([401]))
    async def documents() -> dict[str, Any]:
        return {"object": "list", "data": [kept.told() for kept in shelf]}

    @app.get("/v1/documents/{number}", response_model=bodies.DocumentBody, responses=errors(LOOK))
    async def document(number: str) -> dict[str, Any]:
        return shelf[number].told()

    @app.get("/v1/documents/{number}/content", response_class=PlainTextResponse, responses=errors(LOOK))
    async def content(number: str) -> Response:
        return PlainTextResponse(shelf[number].text)

    @app.get("/v1/documents/{number}/passages", response_model=bodies.Passages, responses=errors(LOOK))
    async def passages(number: str) -> dict[str, Any]:
        return shelf[number].passages()

    @app.delete("/v1/documents/{number}", response_model=bodies.Deleted, responses=errors(LOOK))
    async def forget(number: str) -> dict[str, Any]:
        shelf.remove(number)
        return {"id": number, "object": "document", "deleted": True}

    @app.get("/v1/models", response_model=bodies.ModelList, responses=errors([401]))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{asked:path}", response_model=bodies.ModelBody, responses=errors(LOOK))
    async def model(asked: str) -> dict[str, Any]:
        check_name(asked)
        return served

    @app.get("/health", response_model=bodies.Health)
    async def health() -> dict[str, Any]:
        return {"status": "ok", "last_error": ranks.last_error}

    @app.get("/ready", response_model=bodies.Ready, responses={503: {"model": bodies.Ready, "description": "Not now."}})
    async def ready() -> Response:
        return JSONResponse({"ready": ranks.ready}, 200 if ranks.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counted() -> Response:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> Response:
        return JSONResponse(Refusal(400, str(error)).body, 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(Refusal(400, _sentence(error)).body, 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one of the path's routes
            routes = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
            headers["Allow"] = ", ".join(sorted({name for route in routes for name in getattr(route, "methods", ())}))
        return JSONResponse(Refusal(error.status_code, message).body, error.status_code, headers)

    return app


def _sentence(error: RequestValidationError) -> str:
    """One sentence for the most deeply nested validation error: a union reports one for each of its types."""
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    # Besides field names and list indices, locations contain the types of a union.
    parts = [part for part in first["loc"][1:] if part not in ("str", "int") and "[" not in str(part)]
    where = ".".join(map(str, parts))
    if first["type"] == "json_invalid":
        return "The request's body is not JSON."
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"The request's {where or 'body'} is wrong: {first['msg'].rstrip('.')}."
