"""LlamaIndex's client of servers that speak as OpenAI's does."""

from __future__ import annotations

import time
from typing import Any

import pytest

# Not in the tests' extra: 400 MB, and LangChain wants an older openai than the other tests.
pytest.importorskip("llama_index.llms.openai_like", reason="needs the environment of make test-clients")

import openai
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from real_server import Server

QUESTION = "Who kept the light of Orrin?"


def client(server: Server, **more: Any) -> OpenAILike:
    asked = {"max_tokens": 12, "temperature": 0.0, "is_chat_model": True, "model": "tiny"} | more
    return OpenAILike(api_base=server.url, api_key="none", max_retries=0, context_window=4096, **asked)


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_chat_turns_and_usage(server: Server) -> None:
    """A conversation is read as it was written, and its cost is told."""
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", QUESTION)]
    expected = server.chat(*turns)
    answer = client(server).chat([ChatMessage(role=role, content=text) for role, text in turns])
    assert answer.message.content == content(expected)
    assert answer.additional_kwargs["completion_tokens"] == expected["usage"]["completion_tokens"]


def test_streaming(server: Server) -> None:
    """The pieces are the answer."""
    pieces = client(server).stream_chat([ChatMessage(role="user", content=QUESTION)])
    assert "".join(piece.delta or "" for piece in pieces) == content(server.chat(("user", QUESTION)))


def test_completions(server: Server) -> None:
    """A text goes on; streamed it is the same."""
    expected = server.post("/completions", prompt="Once upon a time")["choices"][0]["text"]
    plain = client(server, is_chat_model=False)
    assert plain.complete("Once upon a time").text == expected
    assert "".join(piece.delta or "" for piece in plain.stream_complete("Once upon a time")) == expected


def test_stop_and_log_probabilities(server: Server) -> None:
    """Given as LlamaIndex passes them on."""
    whole = content(server.chat(("user", QUESTION)))
    stop = whole[4:6]
    asked = [ChatMessage(role="user", content=QUESTION)]
    assert client(server).chat(asked, stop=[stop]).message.content == whole[: whole.index(stop)]
    scored = client(server, logprobs=True, top_logprobs=2).chat(asked)
    assert scored.logprobs is not None and len(scored.logprobs) == 12


def test_errors(server: Server) -> None:
    """They come as the client's own, with the server's sentence."""
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here"):
        client(server, model="gpt-9").complete(QUESTION)
    with pytest.raises(openai.BadRequestError, match="text to stop at is empty"):
        client(server).chat([ChatMessage(role="user", content=QUESTION)], stop=[""])


def test_cancellation(server: Server) -> None:
    """A client that stops listening leaves nothing at work."""
    pieces = client(server, max_tokens=3000).stream_chat([ChatMessage(role="user", content=QUESTION)])
    next(iter(pieces))
    del pieces
    until = time.monotonic() + 10
    while server.busy() and time.monotonic() < until:
        time.sleep(0.1)
    assert server.busy() == 0
