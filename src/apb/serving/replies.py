"""Response bodies in the format of the OpenAI API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import Cancelled, InputError, NotFinite, unexpected
from ..generation import Generation, Scored
from .answers import Failed, Lost

# Seconds after which a client is told to come again while ranks are started.
AGAIN_S = 15
# JSON has no infinity.
_LOWEST = -9999.0


class Refusal(Exception):
    """An error response: HTTP status, an error object in OpenAI's format, and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


def failure(error: Exception) -> Refusal:
    """The error response for a request that failed after it was accepted."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InputError):
        return Refusal(400, str(error))
    if isinstance(error, Cancelled):
        return Refusal(499, str(error), code="cancelled")
    if isinstance(error, Lost):
        return Refusal(503, str(error), "server_error", "ranks_lost", {"Retry-After": str(AGAIN_S)})
    told = str(error) if isinstance(error, (NotFinite, Failed)) else unexpected(error)
    return Refusal(500, told, "server_error")


def sse(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


class Reply:
    """The bodies of one request's response; ``said``: what "apb" says beside how the prompt was read."""

    kind, piece = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, said: dict[str, Any], name: Callable[[int], str]) -> None:
        self._head = {"id": f"{self._prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._said = said
        self._name = name

    _prefix = "chatcmpl"

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        """Body of whole answers."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        return {**self._head, "object": self.kind, "choices": choices, **self.figures(results)}

    def first(self, index: int) -> str | None:
        """Event that opens a streamed answer, if there is one."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def text(self, index: int, text: str, scored: Sequence[Scored]) -> str:
        """Event with a piece of a streamed answer."""
        return self._chunk(index, {"delta": {"content": text}, "logprobs": self.scores(scored)})

    def last(self, index: int, result: Generation) -> str:
        """Event with which a streamed answer ends."""
        figures = self.figures([result])["apb"]
        return self._chunk(index, {"delta": {}, "logprobs": None}, result.finish_reason, apb=figures)

    def usage(self, results: Sequence[Generation]) -> str:
        """Event with the token usage, the last of a streamed answer if requested."""
        return sse({**self._head, "object": self.piece, "choices": [], "usage": self.figures(results)["usage"]})

    def figures(self, results: Sequence[Generation]) -> dict[str, Any]:
        """Token usage, and under "apb" how the prompt was read and the answer decoded, whether exactly, and notes."""
        read, written = results[0].prompt_tokens, sum(len(result.token_ids) for result in results)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        kept = ("strategy", "exact", "plan", "timing", "decode", "choice", "read_for", "notes")
        told = {key: value for key, value in results[0].to_dict().items() if key in kept}
        return {"usage": usage, "apb": told | self._said}

    def scores(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        """The log-probabilities of some tokens; None if there are none."""
        if not scored:
            return None
        return {
            "content": [
                self._entry(each.token, each.logprob)
                | {"top_logprobs": [self._entry(token, value) for token, value in each.top]}
                for each in scored
            ]
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": max(value, _LOWEST), "bytes": list(name.encode(errors="replace"))}

    def _choice(self, index: int, result: Generation) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text}
        scores = self.scores(result.scored)
        return {"index": index, "message": message, "finish_reason": result.finish_reason, "logprobs": scores}

    def _chunk(self, index: int, content: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": index, **content, "finish_reason": finish_reason}
        return sse({**self._head, "object": self.piece, "choices": [choice], **more})


class TextReply(Reply):
    """Bodies of POST /v1/completions."""

    kind = piece = "text_completion"
    _prefix = "cmpl"

    def first(self, index: int) -> str | None:
        """There is none: pieces of text are all alike."""
        return None

    def text(self, index: int, text: str, scored: Sequence[Scored]) -> str:
        """See :meth:`Reply.text`."""
        return self._chunk(index, {"text": text, "logprobs": self.scores(scored)})

    def last(self, index: int, result: Generation) -> str:
        """See :meth:`Reply.last`."""
        figures = self.figures([result])["apb"]
        return self._chunk(index, {"text": "", "logprobs": None}, result.finish_reason, apb=figures)

    def scores(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        """See :meth:`Reply.scores`."""
        if not scored:
            return None
        return {
            "tokens": [self._name(each.token) for each in scored],
            "token_logprobs": [max(each.logprob, _LOWEST) for each in scored],
            "top_logprobs": [{self._name(token): max(value, _LOWEST) for token, value in each.top} for each in scored],
        }

    def _choice(self, index: int, result: Generation) -> dict[str, Any]:
        scores = self.scores(result.scored)
        return {"index": index, "text": result.text, "finish_reason": result.finish_reason, "logprobs": scores}
