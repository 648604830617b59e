"""The server as the public client of the OpenAI API sees it, and what it refuses."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from transformers import LogitsProcessor, LogitsProcessorList

import apb
from apb.cli import serve
from apb.hf.loading import position_limit
from apb.serving import bodies, limits
from apb.serving import worker as worker_module
from apb.serving.answers import Answer, Passed, Progress, Task, Written
from apb.serving.app import make_app
from apb.serving.desk import Desk
from apb.serving.fairness import Pace, Share
from apb.serving.front import Front
from apb.serving.orders import APART, ENDED, FAILED, GOES_ON, NOTHING, STOP, _worst
from apb.serving.ranks import Ranks
from apb.serving.tokenizing import Tokenizing
from apb.serving.worker import Worker
from apb.session import extend_together
from command_line import Cli, cli  # noqa: F401

DOCUMENT = "The lighthouse keeper of Orrin was called Maud. " * 8
QUESTION = "Who?"
pytestmark = pytest.mark.usefixtures("server_log")
print_line = limits._log


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> apb.Engine:
    return apb.Engine.from_pretrained(checkpoint, blocks=3, device="cpu")


class Served:
    """A server on a free port, its worker on another thread; ``held`` keeps the worker from beginning jobs."""

    def __init__(
        self, engine: apb.Engine, chat_template: str | None = None, keys: tuple[str, ...] = (), **more: Any
    ) -> None:
        self.worker, self.ranks = Worker(engine), Ranks()
        self.held = threading.Lock()
        self._over = threading.Event()
        begin = self.worker._work

        def work(numbers: Any) -> Any:
            with self.held:
                return begin(numbers)

        self.worker._work = work  # type: ignore[method-assign]
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        limit = position_limit(engine.model.config)
        app = make_app(self.ranks, "tiny", engine.needed_tokenizer(), limit, 7, chat_template, keys, **more)
        self._front = Front(app, listening).__enter__()
        ready = threading.Event()
        Desk(self.worker, self.ranks.connect(lambda facts: ready.set()), lambda: None).open()
        self._working = threading.Thread(target=self.worker.run, args=(self._over.is_set,), daemon=True)
        self._working.start()
        assert ready.wait(10)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def stop(self) -> None:
        self._over.set()
        self._working.join(10)
        self.ranks.disconnect()
        self._front.__exit__(None, None, None)
        assert not self._working.is_alive()

    def idle(self) -> bool:
        return self.worker.running == self.worker.waiting == 0

    def ask(self, content: Any = QUESTION, document: str | None = DOCUMENT, **more: Any) -> Any:
        body = {} if document is None else {"document": document}
        messages = more.pop("messages", [{"role": "user", "content": content}])
        return self.client.chat.completions.create(
            model=more.pop("model", "tiny"), messages=messages, extra_body=body, **more
        )

    def get(self, path: str, method: str = "GET", body: bytes | Iterator[bytes] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()


def until(true: Callable[[], object]) -> None:
    """Wait until it is true."""
    for _ in range(400):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 20 seconds")


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
        DOCUMENT.strip() * 4 + "\n\n" + QUESTION,
        [{"type": "text", "text": DOCUMENT.strip() * 4}, {"type": "text", "text": QUESTION}],
    ],
    ids=["a blank line", "two pieces"],
)
def test_documents_in_the_message(served: Served, engine: apb.Engine, content: Any) -> None:
    """Without the field of this package the last piece, or what follows the last blank line, is the question."""
    answer = served.ask(content, document=None, max_tokens=9)
    assert answer.choices[0].message.content == text_of(engine, DOCUMENT.strip() * 4, max_new_tokens=9)
    assert answer.apb["question"] == {"found": "end", "first": QUESTION, "last": QUESTION, "tokens": len(QUESTION)}


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

    def read() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        lines.extend(line.decode().rstrip("\n") for line in connection.getresponse())

    with served.held:
        reading = threading.Thread(target=read)
        reading.start()
        until(lambda: any(line.startswith(":") for line in lines))
    reading.join(20)
    comments = [line for line in lines if line.startswith(":")]
    assert comments[0] == ": waiting"
    assert any("read " in comment and comment.endswith(" tokens") for comment in comments)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith(("data: {", "data: [DONE]", ":")) for line in lines if line)


CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


def test_ordinary_requests(engine: apb.Engine) -> None:
    """Turns without a document are read exactly, as transformers' template writes them, under every strategy."""
    assert engine.tokenizer is not None
    server = Served(engine, CHAT)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    messages += [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": QUESTION}]
    text = engine.tokenizer.apply_chat_template(messages, chat_template=CHAT, tokenize=False)
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = engine.exactly().generate(apb.Prompt.from_tokens((), ids[:-1], ids[-1:]), max_new_tokens=9)
    try:
        answer = server.ask(messages=messages, document=None, max_tokens=9, extra_headers={})
        assert answer.choices[0].message.content == expected.text
        assert (answer.apb["exact"], answer.apb["strategy"], answer.usage.prompt_tokens) == (True, "full", len(ids))
        assert answer.apb["question"]["found"] == "message"
        raw = server.client.chat.completions.with_raw_response.create(
            model="tiny", messages=messages, max_tokens=1, extra_body={"keep_alive": 5}
        )
        assert raw.headers["X-APB-Warning"] == "ignored: keep_alive"
        assert len(raw.headers["X-Request-Id"]) == 32
    finally:
        server.stop()


def test_completions(served: Served, engine: apb.Engine) -> None:
    """A text goes on as the engine goes on; streamed it is the same, with log-probabilities for every token."""
    text = "Once upon a time"
    ids = engine.tokenizer(text)["input_ids"]  # type: ignore[misc]
    expected = engine.exactly().generate(apb.Prompt.from_tokens((), ids[:-1], ids[-1:]), max_new_tokens=8)
    answer = served.client.completions.create(model="tiny", prompt=text, max_tokens=8, logprobs=2)
    assert answer.choices[0].text == expected.text and answer.usage.prompt_tokens == len(ids)
    assert len(answer.choices[0].logprobs.token_logprobs) == 8
    chunks = list(served.client.completions.create(model="tiny", prompt=text, max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text


def test_several_answers_with_log_probabilities(served: Served, engine: apb.Engine) -> None:
    """Drawn one after the other from one prefill, each by its seed; every token has its log-probability."""
    drawn = {"temperature": 1.0, "seed": 3, "max_tokens": 6}
    answer = served.ask(n=2, logprobs=True, top_logprobs=2, **drawn)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [text_of(engine, max_new_tokens=6, temperature=1.0, seed=seed) for seed in (3, 4)]
    assert all(len(choice.logprobs.content) == 6 for choice in answer.choices)
    assert all(len(each.top_logprobs) == 2 for each in answer.choices[0].logprobs.content)
    chunks = list(served.ask(n=2, stream=True, logprobs=True, **drawn))
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == texts[index]
        assert sum(len(choice.logprobs.content) for choice in own if choice.logprobs) == 6


def test_answers_in_json(served: Served) -> None:
    """What the request's response_format asks for; a schema that cannot be followed is refused."""

    def asked(**form: Any) -> Any:
        return served.ask(max_tokens=40, response_format=form).choices[0].message.content

    assert asked(type="json_object").startswith("{")
    schema = {"type": "array", "items": {"enum": ["on", "off"]}, "minItems": 2, "maxItems": 2}
    said = json.loads(asked(type="json_schema", json_schema={"name": "lights", "schema": schema, "strict": True}))
    assert len(said) == 2 and set(said) <= {"on", "off"}
    with pytest.raises(openai.BadRequestError, match="Invalid type: lamp"):
        asked(type="json_schema", json_schema={"name": "x", "schema": {"type": "lamp"}})


def test_stops(served: Served, engine: apb.Engine) -> None:
    """The answer ends before the text, streamed or not."""
    whole = text_of(engine, max_new_tokens=20)
    stop = whole[4:6]
    expected = whole[: whole.index(stop)]
    answer = served.ask(max_tokens=20, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    chunks = list(served.ask(max_tokens=20, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_documents_are_kept(served: Served) -> None:
    """Given once, read once; questions name it."""
    post = json.dumps({"text": DOCUMENT * 5, "question": QUESTION, "name": "orrin"}).encode()
    status, body = served.get("/v1/documents", "POST", post)
    told = json.loads(body)
    assert status == 202 and told["id"].startswith("doc-")
    while told["status"] == "reading":
        told = json.loads(served.get(f"/v1/documents/{told['id']}")[1])
    assert (told["status"], told["read"], told["name"]) == ("read", told["tokens"], "orrin")
    hits = served.worker.kept.told.hits
    answer = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], extra_body={"document_id": told["id"]}
    )
    assert served.worker.kept.told.hits == hits + 1 and answer.apb["read_for"] == "this question"
    assert [each["id"] for each in json.loads(served.get("/v1/documents")[1])["data"]] == [told["id"]]
    assert served.get(f"/v1/documents/{told['id']}", "DELETE")[0] == 200
    assert served.get(f"/v1/documents/{told['id']}")[0] == 404


def test_passages_of_a_document(served: Served) -> None:
    """A text kept without reading is read for the first question on it; what was passed on is told in characters."""
    text = "\u00d6de. " + DOCUMENT * 4
    post = json.dumps({"text": text, "read": False}).encode()
    path = f"/v1/documents/{json.loads(served.get('/v1/documents', 'POST', post)[1])['id']}"
    assert json.loads(served.get(path)[1])["status"] == "unread"
    assert served.get(f"{path}/content") == (200, text)
    status, body = served.get(f"{path}/passages")
    assert status == 404 and "ask it a question first" in json.loads(body)["error"]["message"]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    body = {"document_id": path.rpartition("/")[2]}
    chunks = list(served.client.chat.completions.create(model="tiny", messages=messages, stream=True, extra_body=body))
    assert chunks[-1].apb["read_for"] == "this question"
    told = json.loads(served.get(path)[1])
    assert (told["status"], told["question"]) == ("read", QUESTION)
    found = json.loads(served.get(f"{path}/passages")[1])
    assert found["question"] == QUESTION and found["went_on"] == []
    spans = [(each["start"], each["stop"]) for each in found["data"]]
    assert spans == sorted(spans) and all(0 <= start < stop <= len(text) for start, stop in spans)
    assert all(0 < each["share"] <= 1 for each in found["data"])
    plan = chunks[-1].apb["plan"]
    third = plan["document_tokens"] // 3
    assert any(start < third for start, _ in spans) and max(stop for _, stop in spans) <= 2 * third + 2
    served.get(path, "DELETE")
    served.get("/v1/documents", "POST", post)  # given again it is found read, and what was passed on with it
    answer = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Where?"}], extra_body=body
    )
    assert answer.apb["read_for"] == "another question"
    assert json.loads(served.get(f"{path}/passages")[1])["data"] == found["data"]
    served.get(path, "DELETE")


def test_bodies_are_limited(served: Served) -> None:
    """Before they are parsed or tokenized. A client is told, not cut off, whether or not it says how much it sends."""
    for large in (b" " * 600_000, b" " * 20_000_000, iter([b" " * 400_000] * 40)):
        status, body = served.get("/v1/chat/completions", "POST", large)
        assert status == 413 and "at most" in json.loads(body)["error"]["message"]
    message = {"messages": [{"role": "user", "content": "x" * 70_000}]}
    status, body = served.get("/v1/chat/completions", "POST", json.dumps(message).encode())
    assert status == 400 and "at most 65,536" in json.loads(body)["error"]["message"]


def test_keys(engine: apb.Engine) -> None:
    """Without one of the server's keys there is no answer; health needs none."""
    server = Served(engine, keys=("secret", "other"))
    try:
        with pytest.raises(openai.AuthenticationError):
            server.ask()
        server.client.api_key = "other"
        assert server.ask(max_tokens=2).usage.completion_tokens == 2
        assert server.get("/health")[0] == 200
    finally:
        server.stop()


def test_web_pages_of_other_origins(engine: apb.Engine) -> None:
    """A browser asks first, without a key; then it may read answers and refusals. Pages that are not named may not."""
    server = Served(engine, keys=("one key",), origins=("https://orrin.example",))

    def headers(method: str, origin: str) -> tuple[int, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        connection.request(method, "/v1/models", headers={"Origin": origin} | (asks if method == "OPTIONS" else {}))
        response = connection.getresponse()
        return response.status, response.headers["Access-Control-Allow-Origin"]

    try:
        assert headers("OPTIONS", "https://orrin.example") == (200, "https://orrin.example")
        assert headers("GET", "https://orrin.example") == (401, "https://orrin.example")
        assert headers("OPTIONS", "https://other.example") == (400, None)
    finally:
        server.stop()


def test_reading_exactly_on_request(engine: apb.Engine, served: Served) -> None:
    """Where the operator lets it; else it is refused, as is any other option."""
    server = Served(engine, may_ask_exact=True)

    def ask(of: Served, **apb: Any) -> Any:
        body = {"document": DOCUMENT, "apb": apb}
        messages = [{"role": "user", "content": QUESTION}]
        return of.client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, extra_body=body)

    try:
        answer = ask(server, exact=True)
        prompt = apb.Prompt.for_model(engine.needed_tokenizer(), DOCUMENT, QUESTION)
        assert answer.choices[0].message.content == engine.exactly().generate(prompt, max_new_tokens=9).text
        assert answer.apb["exact"] and not ask(server, exact=False).apb["exact"]
        with pytest.raises(openai.BadRequestError, match=r"The request's apb.blocks is wrong"):
            ask(server, blocks=8)
    finally:
        server.stop()
    with pytest.raises(openai.BadRequestError, match="is not allowed on this server"):
        ask(served, exact=True)


def test_requests_are_logged(served: Served, server_log: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, which says what it cost and nothing of what was said."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "document": DOCUMENT, "max_tokens": 2})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    read = json.loads(response.read())["usage"]["prompt_tokens"]
    served.get("/v1/models/%0aMaud")
    served.get("/health")

    def logged(what: str) -> str:
        """A request's line, which comes when its response is on its way."""
        until(lambda: any(what in line for line in server_log))
        (line,) = (line for line in server_log if what in line)
        return line

    answered = logged(str(response.headers["X-Request-Id"]))
    assert " POST /v1/chat/completions 200 " in answered
    assert answered.endswith(f" s, {read} tokens read, 2 written")
    assert logged(" GET /v1/models/?Maud 404 ")
    assert not [line for line in server_log if "/health" in line or "lighthouse" in line]
    print_line("how it is written")
    assert capsys.readouterr().err == "apb: how it is written\n"


def test_unforeseen_failures_of_the_server(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are that request's, in the form of all others."""

    async def fail(*_: Any) -> None:
        raise LookupError("no\nwords")

    monkeypatch.setattr(Tokenizing, "chat", fail)
    with pytest.raises(openai.InternalServerError, match="LookupError: no words"):
        served.ask()
    monkeypatch.undo()
    assert served.ask(max_tokens=2).usage.completion_tokens == 2


CERTIFICATE = Path(__file__).parents[1] / "localhost.pem"


def test_https(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    """A certificate makes the server one of HTTPS; one that cannot be used is refused before anything is loaded."""
    app, listening = FastAPI(), socket.create_server(("127.0.0.1", 0))
    app.get("/")(lambda: "lit")
    with Front(app, listening, ssl_certfile=CERTIFICATE, ssl_keyfile=None):
        trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
        client = http.client.HTTPSConnection("localhost", listening.getsockname()[1], context=trusted, timeout=20)
        client.request("GET", "/")
        assert client.getresponse().read() == b'"lit"'
        client.close()
    (tmp_path / "no.pem").write_text("Maud")
    for asked in (["--ssl-certfile", tmp_path / "no.pem"], ["--ssl-certfile", tmp_path / "none.pem"]):
        cli("serve", "--port", 0, *asked).refused("cannot be used", "--ssl-keyfile")
    cli("serve", "--port", 0, "--ssl-keyfile", CERTIFICATE).refused("name that with --ssl-certfile")


WRONG = {
    "empty question": ({"content": " "}, "message from user is empty"),
    "empty document": ({"document": "\n"}, "document is empty"),
    "unknown field": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported here"),
    "many answers": ({"n": 9}, "The request's n is wrong"),
    "a picture": (
        {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        "The request's messages.0.content.0.type is wrong: Input should be 'text'",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "The request's messages.0.content is wrong"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "The request's messages.0.content is wrong"),
    "a penalty": ({"frequency_penalty": 2.5}, "frequency_penalty must be from -2 to 2"),
    "YAML": ({"response_format": {"type": "yaml"}}, "The request's response_format.type is wrong"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "needs 'json_schema': {'schema': ...}"),
    "nowhere to stop": ({"stop": [""]}, "text to stop at is empty"),
    "alternatives alone": ({"top_logprobs": 2}, "'top_logprobs' needs 'logprobs'"),
    "temperature": ({"temperature": -1}, "temperature must be"),
    "length": ({"max_tokens": 0}, "The request's max_tokens is wrong"),
    "too long": ({"document": DOCUMENT * 40}, "more than the model's"),
    "a conversation": (
        {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]},
        "has no chat template",
    ),
    "many messages": ({"messages": [{"role": "user", "content": "x"}] * 300}, "request's messages is wrong"),
    "nobody asks": ({"messages": [{"role": "system", "content": "x"}]}, "last message must be the user's"),
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
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("PUT", "/v1/documents")
    response = connection.getresponse()
    assert (response.status, response.headers["Allow"]) == (405, "GET, POST")
    status, body = served.get("/v1/chat/completions", "POST", b"{")
    assert (status, json.loads(body)["error"]["message"]) == (400, "The request's body is not JSON.")
    status, body = served.get("/v1/chat/completions", "POST", b"[1]")
    assert status == 400 and json.loads(body)["error"]["message"].startswith("The request's body is wrong")


def test_the_description_is_true(served: Served) -> None:
    """Every endpoint has models for what it may answer, none for what it does not, and real answers are of them."""
    told = json.loads(served.get("/openapi.json")[1])
    for path, operations in told["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert "422" not in operation["responses"], where
            for status, response in operation["responses"].items():
                schema = next(iter(response["content"].items()))
                plain = schema[0] == "text/plain" and status == "200"
                assert plain or (schema[0] == "application/json" and "$ref" in schema[1]["schema"]), (where, status)
            if path.startswith("/v1/"):
                assert "401" in operation["responses"], where
    assert "ChatChunk" in told["components"]["schemas"]

    def posted(path: str, **body: Any) -> list[Any]:
        text = served.get(path, "POST", json.dumps({"max_tokens": 2} | body).encode())[1]
        events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: {")]
        return [json.loads(each) for each in events or [text]]

    chat = {"messages": [{"role": "user", "content": QUESTION}], "document": DOCUMENT}
    bodies.ChatCompletion.model_validate(posted("/v1/chat/completions", **chat, logprobs=True)[0])
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = posted("/v1/chat/completions", **chat, logprobs=True, **usage)
    assert len([bodies.ChatChunk.model_validate(chunk) for chunk in chunks]) >= 4
    for more in ({}, {"stream": True}):
        for body in posted("/v1/completions", prompt="Once", logprobs=1, **more):
            bodies.TextCompletion.model_validate(body)


def test_names_of_fields_may_be_anything(served: Served) -> None:
    """What is named in a header cannot end it, nor be what no header may be: one with a blank at its end."""
    for name in ("Orrin\r\nX-Other: 1\u00e9", "", "Maud "):
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1, name: 1}
        assert served.get("/v1/chat/completions", "POST", json.dumps(body).encode())[0] == 200


def test_models_health_and_metrics(served: Served) -> None:
    """The model's name; what has been counted since."""
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'org/other' is not served here"):
        served.client.models.retrieve("org/other")
    assert served.get("/health")[0] == 200 and json.loads(served.get("/health")[1])["status"] == "ok"
    assert served.get("/ready") == (200, '{"ready":true}')

    def counted() -> dict[str, float]:
        lines = [line.rsplit(" ", 1) for line in served.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = counted()
    answer = served.ask(max_tokens=3, n=2)
    after = counted()
    grown = {name: after[name] - before.get(name, 0.0) for name in after if after[name] != before.get(name, 0.0)}
    assert grown["apb_answer_tokens_total"] == 6
    assert grown["apb_prompt_tokens_total"] == answer.usage.prompt_tokens
    assert grown["apb_queue_seconds_count"] == grown["apb_prefill_seconds_count"] == 1
    assert grown["apb_decode_seconds_count"] == grown['apb_strategy_requests_total{strategy="apb"}'] == 2
    assert grown['apb_requests_total{status="200"}'] == 1
    assert after["apb_waiting_requests"] == 0


def test_clients_that_go_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody waits for any more is not begun, or ended at the next layer or token; the next one is answered."""
    worked: list[Any] = []
    begin = served.worker._work
    monkeypatch.setattr(served.worker, "_work", lambda numbers: worked.append(numbers) or begin(numbers))

    def here() -> list[worker_module.Job]:
        return [*served.worker._running.values(), *served.worker._waiting]

    with served.held:
        for number, streamed in enumerate((False, True)):
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
            message = {"role": "user", "content": QUESTION}
            body = {"messages": [message], "document": DOCUMENT, "max_tokens": 400, "stream": streamed}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            until(lambda: len(here()) > number)  # noqa: B023
            connection.close()
            until(lambda: all(job.cancelled.is_set() for job in here()))
    assert served.ask(max_tokens=2).usage.completion_tokens == 2
    assert len(worked) - 1 <= 3 + 1 + 2 + 2  # one piece of what was at work, and those of the one that was answered
    worked.clear()
    pieces = served.ask(max_tokens=400, stream=True)
    next(pieces)
    with served.held:
        pieces.close()
        until(lambda: all(job.cancelled.is_set() for job in here()))
        begun = len(worked)
    assert served.ask(max_tokens=2).usage.completion_tokens == 2
    until(served.idle)
    assert len(worked) - begun <= 1 + 3 + 1 + 2 + 2


def test_too_many_wait(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 429 and when to come again, for who comes after the last place is taken; who waits is answered."""
    answers: list[Any] = []
    monkeypatch.setattr(worker_module, "MOST_RUNNING", 1)
    monkeypatch.setattr(worker_module, "MOST_WAITING", 1)
    with served.held:
        first = [threading.Thread(target=lambda: answers.append(served.ask(max_tokens=1))) for _ in range(2)]
        first[0].start()
        until(lambda: served.worker.running)
        first[1].start()
        until(lambda: served.worker.waiting)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting; try again later") as caught:
            served.ask()
        assert caught.value.code == "overloaded" and int(caught.value.response.headers["Retry-After"]) >= 1
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
    monkeypatch.setattr(worker._orders, "exchanged", lambda *order: said.append(order) or order)
    worker.run(lambda: len(said) == 3)
    assert [kind for _, kind, _ in said] == [NOTHING] * 3 + [STOP]


@pytest.fixture
def alone(engine: apb.Engine) -> Worker:
    return Worker(engine)


def prompt_of(engine: apb.Engine, document: str = DOCUMENT) -> apb.Prompt:
    assert engine.tokenizer is not None
    return apb.Prompt.for_model(engine.tokenizer, document, QUESTION)


def test_requests_take_turns(engine: apb.Engine, alone: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short question overtakes a long text between two of its layers; both answers are as if each were alone."""
    # Predicted by length alone: this machine may be slow at any moment.
    monkeypatch.setattr(Share, "reading_left_s", lambda share, pace: float(share.to_read - share.read))
    monkeypatch.setattr(Share, "writing_left_s", lambda share, pace: float(share.to_write - share.written))
    texts = [DOCUMENT * 9, DOCUMENT]
    alone_answers = [engine.generate(prompt_of(engine, text), max_new_tokens=5).text for text in texts]
    told: list[tuple[int, Any]] = []

    def hear(number: int, event: Any) -> None:
        told.append((number, event))
        if number == 0 and isinstance(event, Progress) and len(told) == 1:  # in the middle of its first layer
            task = Task(prompt_of(engine, texts[1]), {"max_new_tokens": 5})
            assert alone.submit(task, lambda event: hear(1, event)) is not None

    alone.submit(Task(prompt_of(engine, texts[0]), {"max_new_tokens": 5}), lambda event: hear(0, event))
    alone.run(lambda: [event for _, event in told].count(None) == 2)
    answers = {number: event.result.text for number, event in told if isinstance(event, Answer)}
    assert [answers[0], answers[1]] == alone_answers
    ended = [number for number, event in told if event is None]
    assert ended == [1, 0]
    begun = next(place for place, (number, _) in enumerate(told) if number == 1)
    assert sum(number == 0 for number, _ in told[:begun]) == 1 and told[-1] == (0, None)


def test_one_request_fails_alone(engine: apb.Engine, alone: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another that was begun before it is answered."""
    prompts = [prompt_of(engine), prompt_of(engine, DOCUMENT * 2)]
    expected = engine.generate(prompts[0], max_new_tokens=9).text
    prefill = engine.prefill

    def fail(prompt: apb.Prompt, **given: Any) -> Any:
        if prompt == prompts[1]:
            raise RuntimeError("out of luck")
        return prefill(prompt, **given)

    monkeypatch.setattr(engine, "prefill", fail)
    told: list[tuple[int, Any]] = []
    for number, prompt in enumerate(prompts):
        alone.submit(Task(prompt, {"max_new_tokens": 9}), lambda event, number=number: told.append((number, event)))
    alone.run(lambda: sum(not isinstance(event, (Progress, Passed, Written, Answer)) for _, event in told) == 2)
    assert [event.result.text for number, event in told if isinstance(event, Answer)] == [expected]
    assert [str(event) for number, event in told if number == 1] == ["out of luck"]
    assert alone.last_error is not None and alone.last_error.startswith("RuntimeError at ")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each pass has read a token of, of those of several; all is read before anything is written."""
    sizes: list[int] = []

    def counted(sessions: Any, tokens: Any) -> None:
        sizes.append(len(sessions))
        extend_together(sessions, tokens)

    monkeypatch.setattr(worker_module, "extend_together", counted)
    monkeypatch.setattr(worker_module, "next_of", lambda shares, pace: min(shares, key=lambda share: share.writing))
    monkeypatch.setattr(Pace, "in_one_pass", lambda *_: True)
    return sizes


def test_answers_are_written_together(engine: apb.Engine, alone: Worker, passes: list[int]) -> None:
    """16 at once, of ordinary requests too, each by its own sampling and length: what the engine gives alone."""
    samplings: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 5, "top_k": 20}, {"top_logprobs": 2}]
    samplings += [{"schema": '{"type": "array", "items": {"enum": [1, 2]}}'}, {"repetition_penalty": 1.3}]
    tasks = [
        Task(
            apb.Prompt.for_model(engine.needed_tokenizer(), DOCUMENT[: 99 + 20 * number], f"Who kept light {number}?"),
            {"max_new_tokens": 6 + number % 5} | samplings[number % len(samplings)],
            ordinary=number % 4 == 3,
        )
        for number in range(16)
    ]
    told: list[list[Any]] = [[] for _ in tasks]
    for task, events in zip(tasks, told, strict=True):
        alone.submit(task, events.append)
    alone.run(lambda: all(None in events for events in told))
    for task, events in zip(tasks, told, strict=True):
        reader = engine.exactly() if task.ordinary else engine
        wanted = reader.generate(task.prompt, **task.sampling)
        result = next(event.result for event in events if isinstance(event, Answer))
        assert (result.token_ids, result.text, result.finish_reason) == (
            wanted.token_ids,
            wanted.text,
            wanted.finish_reason,
        )
        assert "".join(event.text for event in events if isinstance(event, Written)) == wanted.text
        assert [each.logprob for each in result.scored] == pytest.approx([w.logprob for w in wanted.scored], abs=1e-4)
    assert max(passes) == 16


def test_others_go_on_when_one_ends(
    engine: apb.Engine, alone: Worker, passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of answers that are written together one client leaves, one answer's scores become NaN, and one
    fails while its token is chosen: each ends alone."""

    class Unlucky(LogitsProcessor):
        def __call__(self, ids: Any, scores: Any) -> Any:
            if len(passes) > 5:
                raise RuntimeError("out of luck")
            return scores

    prompts = [prompt_of(engine, f"{number}. {DOCUMENT[:99]}") for number in range(6)]
    expected = [engine.generate(prompt, max_new_tokens=20) for prompt in prompts]
    spoiled = list(engine.reading.arranged(prompts[4]).token_ids)
    told: list[list[Any]] = [[] for _ in prompts]
    jobs = []
    for number, prompt in enumerate(prompts):
        more = {"logits_processor": LogitsProcessorList([Unlucky()])} if number == 3 else {}
        jobs.append(alone.submit(Task(prompt, {"max_new_tokens": 20} | more), told[number].append))

    def over() -> bool:
        if len(passes) > 5:
            jobs[1].cancel()  # type: ignore[union-attr]
            for session, _ in filter(None, (turn.unread for turn in alone._turns.values())):
                if session.token_ids[: len(spoiled)] == spoiled:
                    session.cache.layers[0].values[...] = float("nan")
        return all(isinstance(events[-1], (Exception, type(None))) for events in told if events) and all(told)

    alone.run(over)
    ends = [events[-1] for events in told]
    assert [type(end) for end in ends[1:5:2]] == [apb.Cancelled, RuntimeError] and isinstance(ends[4], apb.NotFinite)
    for number in (0, 2, 5):
        result = next(event.result for event in told[number] if isinstance(event, Answer))
        assert result.token_ids == expected[number].token_ids
    assert not alone._apart and "one by one" not in capsys.readouterr().err


def test_a_pass_that_fails_is_done_one_by_one(
    engine: apb.Engine, alone: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that who is the reason fails alone; here none is, and all are answered."""

    def fail(*_: Any) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(worker_module, "extend_together", fail)
    prompts = [prompt_of(engine, f"{number}. {DOCUMENT}") for number in range(3)]
    told: list[list[Any]] = [[] for _ in prompts]
    for prompt, events in zip(prompts, told, strict=True):
        alone.submit(Task(prompt, {"max_new_tokens": 9}), events.append)
    alone.run(lambda: all(None in events for events in told))
    for prompt, events in zip(prompts, told, strict=True):
        result = next(event.result for event in events if isinstance(event, Answer))
        assert result.token_ids == engine.generate(prompt, max_new_tokens=9).token_ids
    assert "answers go on one by one. RuntimeError: no room\n" in capsys.readouterr().err
    assert not alone._apart


def test_ranks_agree_on_how_requests_went() -> None:
    """What failed on one has failed; so has what some have read and others have not, as they cannot go on alike."""
    assert [_worst(states) for states in ((GOES_ON, ENDED), (ENDED, FAILED), (APART, APART))] == [ENDED, FAILED, APART]
    assert [_worst(states) for states in ((GOES_ON, APART), (APART, ENDED))] == [FAILED, FAILED]


def test_what_has_been_read_stays(engine: apb.Engine, alone: Worker) -> None:
    """Another question on the same text reads only its rows, and the first one's answer comes out again."""
    text, told = DOCUMENT * 4, []
    assert engine.tokenizer is not None

    def ask(question: str) -> tuple[int, Any]:
        told.clear()
        prompt = apb.Prompt.for_model(engine.tokenizer, text, question)
        alone.submit(Task(prompt, {"max_new_tokens": 6}), told.append)
        alone.run(lambda: None in told)
        reads = sum(isinstance(event, Progress) for event in told)
        return reads, next(event.result for event in told if isinstance(event, Answer))

    expected = engine.generate(apb.Prompt.for_model(engine.tokenizer, text, QUESTION), max_new_tokens=6)
    reads, first = ask(QUESTION)
    assert reads > 0 and (first.text, first.read_for) == (expected.text, "this question")
    reads, other = ask("Where?")
    assert reads == 0 and other.read_for == "another question"
    reads, again = ask(QUESTION)
    assert reads == 0 and again.text == expected.text and alone.kept.told.hits == 2
    alone.kept.clear()
    assert ask(QUESTION)[0] > 0


def test_memory_decides_who_begins(engine: apb.Engine, alone: Worker) -> None:
    """What does not fit beside those that run waits; alone it is begun whatever is predicted."""
    told: list[Any] = []
    jobs = [alone.submit(Task(prompt_of(engine, DOCUMENT * n), {"max_new_tokens": 3}), told.append) for n in (1, 2)]
    assert all(job is not None for job in jobs)
    alone.room = 1
    most: list[int] = []
    alone.run(lambda: most.append(alone.running) or told.count(None) == 2)  # type: ignore[func-returns-value]
    assert max(most) == 1


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
    monkeypatch.setattr(serve, "_run", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cli("serve", "--port", taken.getsockname()[1]).refused("Nothing can listen at 127.0.0.1", "--port")
    cli("serve", "--port", 70000).refused("A port is a number from 0 to 65535")
    cli("serve", "--port", 0, "--model", checkpoint / "none").refused("does not exist")
    cli("serve", "--port", 0, "--blocks", 0).refused("Blocks must be at least 1")
    cli("serve", "--port", 0, "--max-new-tokens", 0).refused("--max-new-tokens must be at least 1")
    cli("serve", "--port", 0, "--heads", checkpoint / "config.json").refused("config.json")
    (tmp_path / "half.jinja").write_text("{% for message in ")
    cli("serve", "--port", 0, "--model", checkpoint, "--chat-template", tmp_path / "half.jinja").refused("template")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    cli("serve", "--port", 0).refused("A server needs uvicorn, which is not installed; install apb-llm[serve]")


def test_many_clients_of_which_half_leave(served: Served, engine: apb.Engine) -> None:
    """Whoever stays gets the engine's own answer; who leaves leaves nothing behind."""
    assert engine.tokenizer is not None
    questions = [f"Who kept light {number}?" for number in range(4)]
    lengths = (1, 3, 6)
    expected = {
        (length, question): text_of(engine, f"{length} {question} {DOCUMENT * length}", question, max_new_tokens=6)
        for length in lengths
        for question in questions
    }

    def one(number: int) -> bool:
        length, question = lengths[number % 3], questions[number % 4]
        pieces = served.ask(question, f"{length} {question} {DOCUMENT * length}", max_tokens=6, stream=True, timeout=60)
        if number % 2:
            for _ in range(number % 5):
                next(pieces, None)
            pieces.close()
            return True
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        assert text == expected[length, question], (number, text)
        return True

    with ThreadPoolExecutor(12) as clients:
        assert all(clients.map(one, range(48)))
    until(served.idle)
    assert not served.worker._turns
