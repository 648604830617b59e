"""LangChain's client of the OpenAI API."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

# Not in the tests' extra: 400 MB, and LangChain wants an older openai than the other tests.
pytest.importorskip("langchain_openai", reason="needs the environment of make test-clients")

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from real_server import Server

QUESTION = "Who kept the light of Orrin?"
TURNS = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", QUESTION)]


def chat(server: Server, **more: Any) -> ChatOpenAI:
    asked = {"max_tokens": 12, "temperature": 0, "model": "tiny"} | more
    return ChatOpenAI(base_url=server.url, api_key="none", max_retries=0, **asked)


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_chat_and_usage(server: Server) -> None:
    """One message, and what it cost."""
    expected = server.chat(("user", QUESTION))
    answer = chat(server).invoke(QUESTION)
    assert answer.content == content(expected)
    usage = answer.usage_metadata
    assert usage is not None and usage["output_tokens"] == expected["usage"]["completion_tokens"]
    assert usage["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert answer.response_metadata["finish_reason"] == "length"


def test_turns(server: Server) -> None:
    """A conversation is read as it was written."""
    messages = [SystemMessage("Be brief."), HumanMessage("Hello"), AIMessage("Yes?"), HumanMessage(QUESTION)]
    assert chat(server).invoke(messages).content == content(server.chat(*TURNS))


def test_streaming(server: Server) -> None:
    """The pieces are the answer; the usage comes with the last."""
    pieces = list(chat(server, stream_usage=True).stream(QUESTION))
    assert "".join(str(piece.content) for piece in pieces) == content(server.chat(("user", QUESTION)))
    assert [piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata] == [12]


def test_stop(server: Server) -> None:
    """The answer ends before the text."""
    whole = content(server.chat(("user", QUESTION)))
    stop = whole[4:6]
    answer = chat(server).invoke(QUESTION, stop=[stop])
    assert answer.content == whole[: whole.index(stop)] and answer.response_metadata["finish_reason"] == "stop"


def test_log_probabilities(server: Server) -> None:
    """Of every token, with the likeliest in its place."""
    answer = chat(server, logprobs=True, top_logprobs=2).invoke(QUESTION)
    scores = answer.response_metadata["logprobs"]["content"]
    assert len(scores) == 12 and all(len(each["top_logprobs"]) == 2 for each in scores)


def test_structured_output(server: Server) -> None:
    """A schema that LangChain sends, and an object that it reads from the answer."""
    schema = {
        "title": "Light",
        "type": "object",
        "properties": {"lit": {"type": "boolean"}, "keeper": {"enum": ["Maud", "Orrin"]}},
        "required": ["lit", "keeper"],
        "additionalProperties": False,
    }
    light = chat(server, max_tokens=100).with_structured_output(schema, method="json_schema").invoke(QUESTION)
    assert isinstance(light, dict) and light["lit"] in (True, False) and light["keeper"] in ("Maud", "Orrin")


def test_completions(server: Server) -> None:
    """A text goes on; streamed it is the same."""
    model = OpenAI(base_url=server.url, api_key="none", model="tiny", max_tokens=12, temperature=0, max_retries=0)
    expected = server.post("/completions", prompt="Once upon a time")["choices"][0]["text"]
    assert model.invoke("Once upon a time") == expected
    assert "".join(model.stream("Once upon a time")) == expected


def test_errors(server: Server) -> None:
    """They come as the client's own, with the server's sentence."""
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here"):
        chat(server, model="gpt-9").invoke(QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        chat(server, temperature=-1).invoke(QUESTION)


def test_tools_are_refused(server: Server) -> None:
    """In a sentence, not by an answer that ignores them."""

    def lamp(lit: bool) -> str:
        """Switch the lamp."""
        return "on" if lit else "off"

    with pytest.raises(openai.BadRequestError, match="'tools' is not supported here"):
        chat(server).bind_tools([lamp]).invoke(QUESTION)


def test_cancellation(server: Server) -> None:
    """A client that stops listening leaves nothing at work."""

    async def leave() -> None:
        async for _ in chat(server, max_tokens=3000).astream(QUESTION):
            return

    asyncio.run(leave())
    until = time.monotonic() + 10
    while server.busy() and time.monotonic() < until:
        time.sleep(0.1)
    assert server.busy() == 0
