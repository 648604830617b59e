"""What is refused before anything is read of it: bodies that are too large or too slow, requests without a key."""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import time
import traceback
import uuid
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .replies import Refusal, failure

# Characters that a prompt may have for each token that the model can read: far more than any text has.
CHARACTERS_PER_TOKEN = 16
# Bytes of a body for each of them, with JSON's escapes, and for all the rest.
_BYTES_PER_CHARACTER, _BYTES_BESIDE = 6, 1 << 16
# Positions of models that set no limit.
UNLIMITED = 1 << 20
# Seconds that a body may take to come in.
BODY_S = 60.0
# Seconds for which the rest of a refused body is taken and dropped. Most clients read no answer before they have sent
# everything, and a connection that is closed on what they send is an error to them that says nothing.
_DROPPING_S = 5.0
# Characters of an address in the log.
_SHOWN = 100


def _log(line: str) -> None:
    """One line for each request: its id, address, status, seconds and tokens, never what it says."""
    print(f"apb: {line}", file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """A text as a header or a line of the log may have it."""
    return "".join(each if each.isascii() and each.isprintable() else "?" for each in text).strip()


def most_characters(positions: int | None) -> int:
    """Characters that a request's texts may have together, for a model of so many positions."""
    return CHARACTERS_PER_TOKEN * (positions or UNLIMITED)


class Gate:
    """ASGI middleware around the API: it reads bodies within limits, asks for a key, counts responses and logs them.

    Plain ASGI, since response wrappers hide that clients disconnect.
    """

    def __init__(self, app: ASGIApp, requests: Counter, characters: int, keys: Collection[str] = ()) -> None:
        self._app = app
        self._requests = requests
        self._most = characters * _BYTES_PER_CHARACTER + _BYTES_BESIDE
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, since, status = uuid.uuid4().hex, time.monotonic(), 0
        state = scope.setdefault("state", {})
        state["request_id"] = number

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
                if scope["path"].startswith("/v1/"):
                    self._requests.labels(status).inc()
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        except Exception as error:
            if status:  # it is on its way, and can only be cut off
                raise
            at = "".join(traceback.format_tb(error.__traceback__))
            _log(f"{number} failed: {type(error).__name__}\n{at}")
            await _respond(watched, failure(error))
        finally:
            if scope["path"].startswith("/v1/"):
                address = f"{scope['method']} {plain(scope['path'])[:_SHOWN]}"
                read, written = state.get("tokens", (0, 0))
                seconds = f"{time.monotonic() - since:.3f} s"
                _log(f"{number} {address} {status or '-'} {seconds}, {read} tokens read, {written} written")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            try:
                if scope["path"].startswith("/v1/"):
                    self._check_key(headers)
                self._check_declared(headers)
            except Refusal:
                if b"expect" not in headers:  # such a client waits to be told whether to send its body
                    await _drop(receive)
                raise
            body = await self._body(receive)
        except Refusal as refusal:
            await _respond(send, refusal)
            return
        told = False

        async def again() -> Message:
            nonlocal told
            if not told:
                told = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, again, send)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        # All are compared, each in constant time: how long it takes tells nothing.
        if self._keys and not sum(hmac.compare_digest(given, key) for key in self._keys):
            message = "This server asks for an API key: send one of its keys as 'Authorization: Bearer KEY'."
            raise Refusal(401, message, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    def _check_declared(self, headers: dict[bytes, bytes]) -> None:
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._most:
            raise self._too_large(int(declared))

    async def _body(self, receive: Receive) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(499, "The client disconnected.", code="cancelled")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._most:
                        if message.get("more_body"):
                            await _drop(receive)
                        raise self._too_large(size)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"The request's body took more than {BODY_S:.0f} seconds; send it faster.") from None

    def _too_large(self, size: int) -> Refusal:
        return Refusal(
            413, f"The request's body has {size:,} bytes, and at most {self._most:,} are read; send a shorter text."
        )


async def _drop(receive: Receive) -> None:
    """Take what is left of a body, for a while."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DROPPING_S):
            while (await receive()).get("more_body"):
                pass


async def _respond(send: Any, refusal: Refusal) -> None:
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")]  # what is left of a body is not read
    headers += [(name.lower().encode(), value.encode()) for name, value in (refusal.headers or {}).items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
