"""The server as the public client of the OpenAI API sees it, and what it refuses."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn

import apb
from apb.cli import serve
from apb.serving import worker as worker_module
from apb.serving.app import make_app
from apb.serving.schema import ChatRequest
from apb.serving.worker import Job, Worker
from command_line import Cli, cli  # noqa: F401

DOCUMENT = "The lighthouse keeper of Orrin was called Maud. " * 8
QUESTION = "Who?"


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> apb.Engine:
    return apb.Engine.from_pretrained(checkpoint, blocks=3, device="cpu")


class Served:
    """A server on a free port, its worker on another thread; ``held`` keeps the worker from beginning jobs."""

    def __init__(self, engine: apb.Engine, chat_template: str | None = None) -> None:
        self.worker = Worker(engine)
        self.held = threading.Lock()
        self._over = threading.Event()
        begin = self.worker._answer

        def answer(*given: Any) -> None:
            with self.held:
                begin(*given)

        self.worker._answer = answer  # type: ignore[method-assign]
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self._http = uvicorn.Server(
            uvicorn.Config(make_app(self.worker, "tiny", 7, chat_template), log_level="warning")
        )
        run = {"kwargs": {"sockets": [listening]}, "daemon": True}
        self._threads = [threading.Thread(target=self._http.run, **run)]
        self._threads += [threading.Thread(target=self.worker.run, args=(self._over.is_set,), daemon=True)]
        for thread in self._threads:
            thread.start()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def stop(self) -> None:
        self._over.set()
        self._http.should_exit = True
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def ask(self, content: Any = QUESTION, document: str | None = DOCUMENT, **more: Any) -> Any:
        body = {} if document is None else {"document": document}
        messages = more.pop("messages", [{"role": "user", "content": content}])
        return self.client.chat.completions.create(
            model=more.pop("model", "tiny"), messages=messages, extra_body=body, **more
        )

    def get(self, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.fixture(scope="module")
def served(engine: apb.Engine) -> Iterator[Served]:
    server = Served(engine)
    yield server
    server.stop()


def text_of(engine: apb.Engine, document: str = DOCUMENT, query: str = QUESTION, **sampling: Any) -> str:
    assert engine.tokenizer is not None
    return engine.generate(apb.Prompt.for_model(engine.tokenizer, document, query), **sampling).text


def test_an_answer(served: Served, engine: apb.Engine) -> None:
    """The engine's own, with the tokens counted and how the prompt was read; the length is the server's or as asked."""
    answer = served.ask()
    assert answer.choices[0].message.content == text_of(engine, max_new_tokens=7)
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == ("length", "chat.completion", "tiny")
    assert answer.choices[0].index == 0
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == 7 + answer.usage.prompt_tokens
    assert (answer.apb["strategy"], answer.apb["exact"], answer.apb["plan"]["blocks"]) == ("apb", False, 3)
    assert answer.apb["plan"]["document_tokens"] < answer.usage.prompt_tokens
    assert answer.apb["decode"] == {"method": "exact", "exact": True, "share": 1.0}
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    longer = served.ask(max_completion_tokens=20, **drawn)
    assert longer.choices[0].message.content == text_of(engine, max_new_tokens=20, **drawn)
    assert served.ask(max_tokens=2).usage.completion_tokens == 2
    assert served.ask(max_tokens=2, max_completion_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    "content",
    [
        DOCUMENT + "\n\n" + QUESTION,
        [{"type": "text", "text": DOCUMENT}, {"type": "text", "text": QUESTION}],
    ],
    ids=["a blank line", "two pieces"],
)
def test_documents_in_the_message(served: Served, engine: apb.Engine, content: Any) -> None:
    """Without the field of this package the last piece, or what follows the last blank line, is the question."""
    answer = served.ask(content, document=None, max_tokens=9)
    assert answer.choices[0].message.content == text_of(engine, max_new_tokens=9)


def test_another_chat_template(engine: apb.Engine) -> None:
    """The server's, instead of the tokenizer's own."""
    template = "{{ messages[-1].content }} In a word!"
    assert engine.tokenizer is not None
    prompt = apb.Prompt.for_model(engine.tokenizer, DOCUMENT, QUESTION, chat_template=template)
    server = Served(engine, template)
    try:
        answer = server.ask(max_tokens=9)
    finally:
        server.stop()
    assert answer.choices[0].message.content == engine.generate(prompt, max_new_tokens=9).text
    assert answer.usage.prompt_tokens == len(prompt) == len(f"{DOCUMENT}\n\n{QUESTION} In a word!")


def test_parts_of_a_message() -> None:
    """What is read as document, question and system text."""

    def parts(content: Any, document: str | None = None, **system: str) -> tuple[str, str, str | None]:
        messages = [{"role": role, "content": text} for role, text in system.items()]
        messages.append({"role": "user", "content": content})
        return ChatRequest.model_validate({"messages": messages, "document": document}).parts()

    pieces = [{"type": "text", "text": text} for text in ("a", "b\n\nb", "c\n\nc")]
    assert parts("q\n\nq", "d") == ("d", "q\n\nq", None)
    assert parts(pieces, "d") == ("d", "a\n\nb\n\nb\n\nc\n\nc", None)
    assert parts(pieces) == ("a\n\nb\n\nb", "c\n\nc", None)
    assert parts(pieces[2:]) == ("c", "c", None)
    assert parts("a\n\nb\n\nq?\n\n", system="be brief") == ("a\n\nb", "q?", "be brief")
    assert parts("a\n\nq", developer="be brief")[2] == "be brief"


def test_streaming(served: Served, engine: apb.Engine) -> None:
    """The pieces joined are the answer; usage comes last where it was asked for, and once."""
    chunks = list(served.ask(max_tokens=12, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == text_of(engine, max_new_tokens=12)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.choices[0].index for chunk in chunks if chunk.choices} == {0}
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert chunks[-2].apb["strategy"] == "apb"
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [12]
    assert all(chunk.usage is None for chunk in served.ask(max_tokens=2, stream=True))


def test_streams_say_how_far_reading_is(served: Served) -> None:
    """Comments, which clients pass over, while there is nothing else to say."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "document": DOCUMENT, "stream": True}
    lines: list[str] = []
    with served.held:
        reading = threading.Thread(
            target=lambda: lines.extend(
                served.get("/v1/chat/completions", "POST", json.dumps(body).encode())[1].split("\n")
            )
        )
        reading.start()
        time.sleep(1.6)
    reading.join(20)
    comments = [line for line in lines if line.startswith(":")]
    assert comments[0] == ": waiting"
    assert any("read " in comment and comment.endswith(" tokens") for comment in comments)
    assert lines[-3] == "data: [DONE]"
    assert all(line.startswith(("data: {", "data: [DONE]", ":")) for line in lines if line)


WRONG = {
    "no document": ({"document": None}, "There is no document"),
    "empty question": ({"content": " "}, "query is empty"),
    "unknown field": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported here"),
    "several answers": ({"n": 2}, "The request's n is wrong"),
    "a picture": (
        {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        "The request's messages.0.content.0.type is wrong: Input should be 'text'",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "The request's messages.0.content is wrong"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "The request's messages.0.content is wrong"),
    "a penalty": ({"frequency_penalty": 0.5}, "'frequency_penalty' is not supported here"),
    "where to stop": ({"stop": ["."]}, "'stop' is not supported here"),
    "temperature": ({"temperature": -1}, "temperature must be"),
    "length": ({"max_tokens": 0}, "The request's max_tokens is wrong"),
    "too long": ({"document": DOCUMENT * 40}, "more than the model's"),
    "a conversation": (
        {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]},
        "one question",
    ),
    "nobody asks": ({"messages": [{"role": "system", "content": "x"}]}, "one question"),
}


@pytest.mark.parametrize(("asked", "sentence"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests(served: Served, asked: dict[str, Any], sentence: str, stream: bool) -> None:
    """Status 400 and one sentence, before anything is read or streamed."""
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask(stream=stream, **asked)
    error = caught.value.body
    assert isinstance(error, dict) and sentence in error["message"]
    assert error["message"].endswith(".") and error["type"] == "invalid_request_error"


def test_fields_that_change_nothing(served: Served, engine: apb.Engine) -> None:
    """What clients send without meaning anything by it is taken; null is as good as left out."""
    unused = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "stop": []}
    unused |= {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    empty = dict.fromkeys(("temperature", "top_p", "seed", "n", "max_completion_tokens", "user", "stream_options"))
    assert served.ask(max_tokens=5, **unused, **empty).choices[0].message.content == text_of(engine, max_new_tokens=5)


def test_wrong_addresses_and_bodies(served: Served) -> None:
    """Other models, paths and methods are not found; what is no JSON says so."""
    with pytest.raises(openai.NotFoundError, match=r"'gpt-9' is not served here; ask for 'tiny'\."):
        served.ask(model="gpt-9")
    assert served.get("/v1/nothing")[0] == 404
    assert served.get("/v1/chat/completions")[0] == 405
    status, body = served.get("/v1/chat/completions", "POST", b"{")
    assert (status, json.loads(body)["error"]["message"]) == (400, "The request's body is not JSON.")
    status, body = served.get("/v1/chat/completions", "POST", b"[1]")
    assert status == 400 and json.loads(body)["error"]["message"].startswith("The request's body is wrong")


def test_models_health_and_metrics(served: Served) -> None:
    """The model's name; what has been counted since."""
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'org/other' is not served here"):
        served.client.models.retrieve("org/other")
    assert served.get("/health") == (200, '{"status":"ok"}')

    def counted() -> dict[str, float]:
        lines = [line.rsplit(" ", 1) for line in served.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = counted()
    answer = served.ask(max_tokens=3)
    after = counted()
    grown = {name: after[name] - before.get(name, 0.0) for name in after if after[name] != before.get(name, 0.0)}
    assert grown["apb_answer_tokens_total"] == 3
    assert grown["apb_prompt_tokens_total"] == answer.usage.prompt_tokens
    assert grown["apb_prefill_seconds_count"] == grown["apb_decode_seconds_count"] == 1
    assert grown['apb_requests_total{status="200"}'] == 1
    assert after["apb_waiting_requests"] == 0


def test_clients_that_go_away(served: Served, engine: apb.Engine) -> None:
    """What nobody waits for any more is not begun, or ended, and the next one is answered."""
    ended: list[object] = []
    stream = engine.stream

    def watched(*given: Any, **options: Any) -> Any:
        try:
            return (yield from stream(*given, **options))
        except apb.Cancelled as error:
            ended.append(error)
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "stream", watched)
        with served.held:
            for streamed in (False, True):
                with pytest.raises(openai.APITimeoutError):
                    list(served.ask(max_tokens=400, stream=streamed, timeout=0.3) or ())
            time.sleep(2.5)
        assert served.ask(max_tokens=2).usage.completion_tokens == 2
        assert len(ended) == 1  # the one that had been taken; the other was never begun
        pieces = served.ask(max_tokens=400, stream=True)
        next(pieces)
        pieces.close()
        assert served.ask(max_tokens=2).usage.completion_tokens == 2
        assert len(ended) == 2


def test_too_many_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 503 for who comes after the last place is taken; who waits is answered."""
    answers: list[Any] = []
    with served.held:
        first = [threading.Thread(target=lambda: answers.append(served.ask(max_tokens=1))) for _ in range(2)]
        monkeypatch.setattr(served.worker._jobs, "maxsize", 1)
        for thread in first:
            thread.start()
            time.sleep(0.5)  # one is taken by the worker, one waits
        with pytest.raises(openai.InternalServerError, match="1 requests are waiting; try again later") as caught:
            served.ask()
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    for thread in first:
        thread.join(20)
    assert len(answers) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("out of\nluck"), 500, "RuntimeError: out of luck"),
        (apb.InputError("Too much."), 400, "Too much."),
        (apb.NotFinite("No numbers."), 500, "No numbers."),
    ],
)
def test_failures_are_told(
    served: Served,
    engine: apb.Engine,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    message: str,
    stream: bool,
) -> None:
    """What goes wrong while answering reaches the client in one line; the server goes on."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(engine, "prefill", fail)
    with pytest.raises(openai.APIError) as caught:
        list(served.ask(stream=stream))
    assert isinstance(caught.value.body, dict) and caught.value.body["message"] == message
    assert stream or (isinstance(caught.value, openai.APIStatusError) and caught.value.status_code == status)
    monkeypatch.undo()
    assert served.ask(max_tokens=2).usage.completion_tokens == 2


def test_other_ranks_hear_of_idle_times(engine: apb.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to do rank 0 says so now and then: waiting in a collective must not run out."""
    monkeypatch.setattr(worker_module, "_HEARTBEAT_S", 0.4)
    worker, said = Worker(engine), []
    monkeypatch.setattr(worker, "_shared", lambda asked, over: said.append((asked, over)) or (asked, over))
    worker.run(lambda: len(said) == 3)
    assert said == [(None, False)] * 3 + [(None, True)]


def test_a_failure_on_several_ranks_ends_them(engine: apb.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hears of it, and the worker ends: the other ranks may be anywhere. A rank alone goes on."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine, "prefill", fail)
    assert engine.tokenizer is not None
    prompt, told = apb.Prompt.for_model(engine.tokenizer, DOCUMENT, QUESTION), []
    worker, sampling = Worker(engine), {"max_new_tokens": 1}
    worker._answer(prompt, sampling, Job(prompt, sampling, told.append))
    monkeypatch.setattr(worker, "_everyone", SimpleNamespace(size=2, rank=0))
    with pytest.raises(RuntimeError, match="out of luck"):
        worker._answer(prompt, sampling, Job(prompt, sampling, told.append))
    assert [str(event) for event in told] == ["out of luck"] * 2


def test_jobs_wait_in_line(engine: apb.Engine) -> None:
    """First come, first served; a cancelled one is passed over."""
    worker, told = Worker(engine), []
    assert engine.tokenizer is not None
    prompt = apb.Prompt.for_model(engine.tokenizer, DOCUMENT, QUESTION)

    def job(number: int) -> Job:
        return Job(prompt, {"max_new_tokens": 1}, lambda event: told.append((number, event)))

    jobs = [job(number) for number in range(3)]
    assert all(worker.submit(one) for one in jobs)
    assert worker.waiting == 3
    jobs[1].cancelled.set()
    worker.run(lambda: worker.waiting == 0 and bool(told))
    assert list(dict.fromkeys(number for number, _ in told)) == [0, 2]


def test_warm_up(engine: apb.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is read and answered, but those that this model cannot read; requests find the engine as it was."""
    monkeypatch.setattr(worker_module, "_WARM_UP", ((40, 5), (1 << 20, 5), (33, 1)))
    assert engine.tokenizer is not None
    prompt = apb.Prompt.for_model(engine.tokenizer, DOCUMENT, QUESTION)
    before, generate, lengths = engine.generate(prompt, max_new_tokens=9), engine.generate, []

    def watched(prompt: apb.Prompt, **sampling: Any) -> Any:
        result = generate(prompt, **sampling)
        lengths.append((len(prompt.document), len(prompt.query), len(result.token_ids)))
        return result

    monkeypatch.setattr(engine, "generate", watched)
    Worker(engine).warm_up()
    assert lengths == [(40, 5, 3), (33, 1, 3)]
    assert generate(prompt, max_new_tokens=9).token_ids == before.token_ids


def test_what_cannot_be_served(
    cli: Cli,  # noqa: F811
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Status 2 and a sentence, before weights are read."""
    monkeypatch.setattr(serve, "work", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cli("serve", "--port", taken.getsockname()[1]).refused("Nothing can listen at 127.0.0.1", "--port")
    cli("serve", "--port", 70000).refused("A port is a number from 0 to 65535")
    cli("serve", "--port", 0, "--model", checkpoint / "none").refused("does not exist")
    cli("serve", "--port", 0, "--blocks", 0).refused("Blocks must be at least 1")
    cli("serve", "--port", 0, "--max-new-tokens", 0).refused("ax_new_tokens must be at least 1")
    cli("serve", "--port", 0, "--heads", checkpoint / "config.json").refused("config.json")
    (tmp_path / "half.jinja").write_text("{% for message in ")
    cli("serve", "--port", 0, "--model", checkpoint, "--chat-template", tmp_path / "half.jinja").refused("template")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    cli("serve", "--port", 0).refused("A server needs uvicorn, which is not installed; install apb[serve]")
