"""`apb serve --answer-with`: read here, answered there; the other server is a small stand-in for vLLM's."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

import apb
from apb.integrations.shelf import Shelf
from apb.serving.answer_with import Answerer, Handing
from apb.serving.app import make_app
from command_line import Cli

DOCUMENT = "The lighthouse keeper of Orrin was called Maud. " * 8


class Vllm:
    """Says " one", " two" and how the request was; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.together = threading.Barrier(1)
        self.refuses = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(json.dumps({"data": [{"id": "theirs"}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.together.wait(20)
                if outer.refuses:
                    self.send_error(400, "too long")
                    return
                events = [
                    {"choices": [{"text": " one", "token_ids": [1], "finish_reason": None}]},
                    {"choices": [{"text": " two", "token_ids": [2, 3], "finish_reason": "stop"}]},
                ]
                self.reply("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

            def reply(self, text: str) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    server = Vllm()
    yield server
    server.http.shutdown()
    server.http.server_close()


class Served:
    """A server of one engine that hands on."""

    def __init__(self, engine: apb.Engine, vllm: Vllm, store: Path) -> None:
        self.worker, self._over = Handing(engine, vllm.url, store), threading.Event()
        listening = socket.create_server(("127.0.0.1", 0))
        self._http = uvicorn.Server(uvicorn.Config(make_app(self.worker, "tiny", 7), log_level="warning"))
        self._threads = [
            threading.Thread(target=self._http.run, kwargs={"sockets": [listening]}, daemon=True),
            threading.Thread(target=self.worker.run, args=(self._over.is_set,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(self, question: str, **more: Any) -> Any:
        messages: Any = [{"role": "user", "content": question}]
        return self.client.chat.completions.create(
            model="tiny", messages=messages, extra_body={"document": DOCUMENT}, **more
        )

    def stop(self) -> None:
        self._over.set()
        self._http.should_exit = True
        for thread in self._threads:
            thread.join(20)


@pytest.fixture(params=["full", "apb"])
def served(request: pytest.FixtureRequest, checkpoint: Path, vllm: Vllm, tmp_path: Path) -> Iterator[Served]:
    options = {"blocks": 3} if request.param == "apb" else {}
    engine = apb.Engine.from_pretrained(checkpoint, strategy=request.param, device="cpu", verify=False, **options)
    server = Served(engine, vllm, tmp_path)
    yield server
    server.stop()


def test_an_answer_from_there(served: Served, vllm: Vllm, tmp_path: Path) -> None:
    """The prompt's tokens and the sampling go there, once the document is stored; the answer comes with our fields."""
    engine = served.worker.engine
    answer = served.ask("Who?", temperature=0.5, top_p=0.9, seed=3, max_tokens=5)
    assert answer.choices[0].message.content == " one two"
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 3)
    prompt = apb.Prompt.for_model(engine.tokenizer, DOCUMENT, "Who?")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.apb["exact"] is (answer.apb["strategy"] == "full")
    assert answer.apb["decode"]["method"] == "vllm"
    (asked,) = vllm.asked
    assert asked == {
        "model": "theirs",
        "prompt": list(prompt.token_ids),
        "stream": True,
        "return_token_ids": True,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "seed": 3,
    }
    (stored,) = Shelf(tmp_path, lambda each: None, print).documents()
    assert tuple(stored.tokens) == prompt.prefix + prompt.document
    assert tuple(stored.question) == prompt.query


def test_what_is_stored_is_not_read_again(served: Served, vllm: Vllm, tmp_path: Path) -> None:
    """An exact document serves every question, an approximate one its own; each is read once."""
    for question in ("Who?", "Who?", "Where was it?", "Who?"):
        last = served.ask(question)
    exact = last.apb["exact"]
    assert len(list(tmp_path.iterdir())) == (1 if exact else 2)
    assert last.apb["read_for"] == "this question"
    assert served.ask("Where was it?").apb["read_for"] == ("another question" if exact else "this question")
    assert len(vllm.asked) == 5


def test_answers_side_by_side_and_streamed(served: Served, vllm: Vllm) -> None:
    """Four requests are there at once; their pieces are passed on as they come."""
    vllm.together = threading.Barrier(4)
    said: list[list[str]] = []

    def ask() -> None:
        pieces = served.ask("Who?", stream=True)
        texts = [each.choices[0].delta.content for each in pieces]
        said.append([text for text in texts if text])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said == [[" one", " two"]] * 4


def test_a_refusal_there(served: Served, vllm: Vllm) -> None:
    """Is this request's error, and the next one is answered."""
    vllm.refuses = True
    with pytest.raises(openai.InternalServerError, match="refused the request with status 400"):
        served.ask("Who?")
    vllm.refuses = False
    assert served.ask("Who?").choices[0].message.content == " one two"


def test_wrong_input(cli: Cli, tmp_path: Path) -> None:
    """Both options or none, a folder, a server that is there: one sentence."""
    with pytest.raises(apb.InputError, match=r"No vLLM server answers at http://127\.0\.0\.1:9: .*start one there"):
        Answerer("http://127.0.0.1:9")
    for options, said in (
        (["--answer-with", "http://127.0.0.1:9"], "go together"),
        (["--answer-with", "http://127.0.0.1:9", "--store", str(tmp_path / "none")], "is no folder"),
    ):
        cli("serve", "--port", "0", *options).refused(said)
