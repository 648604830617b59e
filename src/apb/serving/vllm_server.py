"""A vLLM server as a client sees it: what it serves, and completions of token ids, streamed."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from ..errors import Cancelled, InputError
from ..generation import Sampling, Scored
from .replies import Refusal

# Seconds to connect, and until a server that says nothing counts as gone: it may read a long prompt by itself.
_CONNECT_S, _PATIENCE_S = 5.0, 600.0
_AGAIN_S = "5"
# How vLLM writes tokens in log-probabilities.
_TOKEN = "token_id:"

# vLLM's parameters for every setting of sampling. Where one is left out it follows the checkpoint, which is meant only
# where None means that here too.
_PARAMETERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "max_new_tokens": lambda count: {"max_tokens": count},
    "temperature": lambda value: {"temperature": value},
    "top_k": lambda count: {"top_k": count or 0},
    "top_p": lambda value: {"top_p": 1.0 if value is None else value},
    "min_p": lambda value: {} if value is None else {"min_p": value},
    "repetition_penalty": lambda value: {} if value is None else {"repetition_penalty": value},
    "frequency_penalty": lambda value: {"frequency_penalty": value},
    "presence_penalty": lambda value: {"presence_penalty": value},
    "stop": lambda texts: {"stop": list(texts)},
    "top_logprobs": lambda top: {} if top is None else {"logprobs": top, "return_tokens_as_token_ids": True},
    "schema": lambda text: {} if text is None else {"structured_outputs": {"json": text}},
    # Seeds are of 64 bits, signed there.
    "seed": lambda seed: {} if seed is None else {"seed": seed - 2**64 if seed >= 2**63 else seed},
}


def parameters(sampling: Sampling) -> dict[str, Any]:
    """Sampling as vLLM takes it; InputError for what it has nothing for."""
    found: dict[str, Any] = {}
    for setting in fields(sampling):
        value = getattr(sampling, setting.name)
        if setting.name in _PARAMETERS:
            found |= _PARAMETERS[setting.name](value)
        elif value != setting.default:
            raise InputError(f"{setting.name!r} cannot be handed on to the vLLM server that answers; leave it out.")
    if not sampling.draws:
        found["temperature"] = 0.0
    return found


def scored(logprobs: dict[str, Any] | None, top: int | None) -> list[Scored]:
    """The log-probabilities of a piece of an answer."""
    if logprobs is None or top is None:
        return []

    def token(name: str) -> int:
        return int(name.removeprefix(_TOKEN))

    found = []
    for name, value, others in zip(
        *(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        # The chosen token comes on top of the likeliest ones, unless it is one of them.
        likeliest = sorted(((token(each), lp) for each, lp in others.items()), key=lambda pair: -pair[1])
        found.append(Scored(token(name), value, tuple(likeliest[:top])))
    return found


@dataclass(frozen=True)
class VllmServer:
    """A vLLM server; plain values.

    Attributes:
        url: where it listens.
        model: the name of its model in its API.
        positions: tokens that it takes in prompt and answer together.
    """

    url: str
    model: str
    positions: int

    @classmethod
    def at(cls, url: str, checkpoint: str) -> VllmServer:
        """The server at an address.

        Args:
            url: the address, http://HOST:PORT.
            checkpoint: the folder or hub id that it must serve.

        Raises:
            InputError: there is none, or it serves something else, or does not tell what it took from the store.
        """
        parts = urlsplit(url)
        try:
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is no number
            right = False
        if not right or parts.path.rstrip("/") not in ("", "/v1") or parts.query:
            raise InputError(f"The address of a vLLM server is http://HOST:PORT, not {url!r}.")
        url = f"{parts.scheme}://{parts.netloc}"
        try:
            with Exchange(url, "/v1/models") as exchange:
                served = json.loads(exchange.read())["data"][0]
            server = cls(url, str(served["id"]), int(served["max_model_len"]))
            with server.ask([0], {"max_tokens": 1, "temperature": 0.0}) as exchange:
                told = [usage for _, usage in exchange.pieces() if usage]
        except Refusal as error:
            raise InputError(f"{str(error).rstrip('.')}; start it, or leave --answer-with out.") from error
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"What answers at {url} is no vLLM server; give the address of one.") from error
        name = str(served.get("root") or server.model)
        if not _alike(name, checkpoint):
            raise InputError(
                f"The vLLM server at {url} serves {name!r}, not {checkpoint!r}; start both with one checkpoint."
            )
        if not told or cached(told[-1]) is None:
            raise InputError(
                f"The vLLM server at {url} does not tell how much of a prompt it finds in the store; start it with "
                "--enable-prompt-tokens-details."
            )
        return server

    def ask(self, prompt: Sequence[int], asked: dict[str, Any]) -> Exchange:
        """A streamed completion, on its way."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **asked,
        }
        return Exchange(self.url, "/v1/completions", body)


class Exchange:
    """A request to a server and its answer. Another thread may :meth:`cancel` it, and the server ends its work then."""

    def __init__(self, url: str, path: str, body: dict[str, Any] | None = None) -> None:
        self._url, self._path, self._body = url, path, body
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None
        self.cancelled = False

    def __enter__(self) -> Exchange:
        """Send the request.

        Raises:
            Refusal: the server cannot be reached, or refuses.
        """
        parts = urlsplit(self._url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=_CONNECT_S)
        try:
            connection.connect()
        except OSError as error:
            raise Refusal(
                503,
                f"The vLLM server at {self._url} cannot be reached: {_reason(error)}.",
                "server_error",
                "unreachable",
                {"Retry-After": _AGAIN_S},
            ) from error
        self._socket = connection.sock
        self._socket.settimeout(_PATIENCE_S)
        try:
            self._check()
            data = None if self._body is None else json.dumps(self._body).encode()
            connection.request(
                "GET" if data is None else "POST", self._path, data, {"Content-Type": "application/json"}
            )
            self._response = connection.getresponse()
            if self._response.status != http.client.OK:
                raise self._refused(self._response.status, self._response.read(1 << 16))
        except (OSError, http.client.HTTPException) as error:
            self.__exit__()
            raise self._broken(error) from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._response is not None:
            self._response.close()
        if self._socket is not None:
            self._socket.close()

    def cancel(self) -> None:
        """End it: whoever reads it gets :class:`apb.Cancelled`."""
        self.cancelled = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def read(self) -> bytes:
        """The whole body."""
        assert self._response is not None, "it has been entered"
        try:
            return self._response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error

    def pieces(self) -> Iterator[tuple[list[Any], dict[str, Any] | None]]:
        """(choices, usage) of every event of a stream; usage comes with the last one.

        Raises:
            Cancelled: see :meth:`cancel`.
            Refusal: the answer broke off.
        """
        assert self._response is not None, "it has been entered"
        try:
            for line in self._response:
                said = line.decode().strip()
                if not said.startswith("data:"):
                    continue
                said = said.removeprefix("data:").strip()
                if said == "[DONE]":
                    return
                event = json.loads(said)
                if "error" in event:
                    raise failed(self._url, str(event["error"].get("message", event["error"])))
                yield event.get("choices") or [], event.get("usage")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        raise self._broken(EOFError("the connection was closed"))

    def _check(self) -> None:
        if self.cancelled:
            raise Cancelled("The request was cancelled.")

    def _broken(self, error: Exception) -> Exception:
        if self.cancelled:
            return Cancelled("The request was cancelled.")
        return failed(self._url, f"its answer broke off, {_reason(error)}")

    def _refused(self, status: int, body: bytes) -> Refusal:
        try:
            told = json.loads(body)
            what = str((told.get("error") or told)["message"])
        except (ValueError, LookupError, TypeError, AttributeError):
            what = body[:500].decode(errors="replace")
        what = " ".join(what.split()).rstrip(".")
        if status == http.client.BAD_REQUEST:
            return Refusal(400, f"The vLLM server that answers refuses the request: {what}.")
        return failed(self._url, f"it answered with status {status}, {what}")


def failed(url: str, what: str) -> Refusal:
    """What clients are told of a server that does not answer as it should."""
    return Refusal(502, f"The vLLM server at {url} failed: {what.rstrip('.')}.", "server_error", "bad_gateway")


def cached(usage: dict[str, Any]) -> int | None:
    """How many of a prompt's tokens the server did not read itself; None if it does not say."""
    details = usage.get("prompt_tokens_details") or {}
    count = details.get("cached_tokens")
    return None if count is None else int(count)


def _alike(one: str, other: str) -> bool:
    """True if two names may be those of one checkpoint, which other machines may have in other folders."""
    return os.path.basename(os.path.realpath(one)) == os.path.basename(os.path.realpath(other))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
