"""`apb serve --answer-with`: read here, answered there. The other server is a stand-in for vLLM's."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

import apb
from apb.cli import serve
from apb.generation import Sampling, Scored
from apb.integrations.lookup import Lookup
from apb.serving.app import make_app
from apb.serving.desk import Desk
from apb.serving.front import Front
from apb.serving.ranks import Ranks
from apb.serving.vllm_server import parameters, scored
from apb.serving.worker import Worker
from command_line import Cli, cli  # noqa: F401

DOCUMENT = "The lighthouse keeper of Orrin was called Maud. " * 24
OTHER = "The miller of Tarn was called Jory. " * 32
pytestmark = pytest.mark.usefixtures("server_log")


class Silent(ThreadingHTTPServer):
    """Says nothing of clients that leave early: standard error is what the tests look at."""

    def handle_error(self, *_: Any) -> None:
        """A connection has failed."""


class Vllm:
    """Says " one" and " two" to everything, and notes what it was asked.

    Attributes:
        took: of a prompt's tokens, how many it says that it has found.
        before: called with the connection before it answers.
        status: of its answers to POST.
        ends: False if its answers break off.
        root: the checkpoint that it serves.
    """

    def __init__(self, model: str) -> None:
        self.asked: list[dict[str, Any]] = []
        self.took: Callable[[list[int]], int | None] = lambda prompt: len(prompt) - 1
        self.before: Callable[[socket.socket], Any] = lambda connection: None
        self.status, self.ends, self.root = 200, True, model
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "theirs", "root": outer.root, "max_model_len": 2000}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if len(body["prompt"]) > 1:
                    outer.asked.append(body)
                    outer.before(self.connection)
                if outer.status != 200:
                    self.reply(outer.status, {"error": {"message": "That is too much."}})
                    return
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for index in range(body.get("n", 1)):
                    self.piece(choices=[{"index": index, "text": " one", "token_ids": [1]}])
                    self.piece(choices=[{"index": index, "text": " two", "token_ids": [2, 3]}])
                    if outer.ends:
                        self.piece(choices=[{"index": index, "text": "", "finish_reason": "stop"}])
                took = outer.took(body["prompt"])
                details = None if took is None else {"cached_tokens": took}
                self.piece(choices=[], usage={"prompt_tokens_details": details})
                if outer.ends:
                    self.chunk("data: [DONE]\n\n")
                self.chunk("")

            def piece(self, **event: Any) -> None:
                self.chunk(f"data: {json.dumps(event)}\n\n")

            def chunk(self, text: str) -> None:
                self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

            def reply(self, status: int, body: dict[str, Any]) -> None:
                said = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

        self.http = Silent(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Served:
    """A server of one engine that hands on."""

    def __init__(self, engine: apb.Engine, vllm: Vllm, store: Path, model: str) -> None:
        self.store, self.engine, self._over = store, engine, threading.Event()
        self.worker, self._ranks = Worker(engine), Ranks()
        place: Any = SimpleNamespace(tensor_parallel=1, model=SimpleNamespace(name=model), dtype=engine.dtype)
        self.forwarding = serve._elsewhere(vllm.url, store, place, engine.reading)(self._ranks.submit)
        app = make_app(self._ranks, "tiny", engine.needed_tokenizer(), 4096, 7, forwarding=self.forwarding)
        listening = socket.create_server(("127.0.0.1", 0))
        self._front = Front(app, listening).__enter__()
        ready = threading.Event()
        Desk(self.worker, self._ranks.connect(lambda facts: ready.set()), lambda: None).open()
        self._working = threading.Thread(target=self.worker.run, args=(self._over.is_set,), daemon=True)
        self._working.start()
        assert ready.wait(10)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(self, question: str = "Who?", document: str = DOCUMENT, **more: Any) -> Any:
        messages: Any = [{"role": "user", "content": question}]
        return self.client.chat.completions.create(
            model="tiny", messages=messages, extra_body={"document": document}, **more
        )

    def stored(self) -> int:
        return len(list(self.store.glob("*/document.json")))

    def stop_reading(self) -> None:
        self._over.set()
        self._working.join(10)

    def stop(self) -> None:
        self.stop_reading()
        self._ranks.disconnect()
        self._front.__exit__(None, None, None)


@pytest.fixture(params=["full", "apb"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vllm(checkpoint: Path) -> Iterator[Vllm]:
    server = Vllm(str(checkpoint))
    yield server
    server.stop()


@pytest.fixture
def served(strategy: str, checkpoint: Path, vllm: Vllm, tmp_path: Path) -> Iterator[Served]:
    options = {"blocks": 3} if strategy == "apb" else {}
    engine = apb.Engine.from_pretrained(checkpoint, strategy=strategy, device="cpu", verify=False, **options)
    server = Served(engine, vllm, tmp_path, str(checkpoint))
    yield server
    server.stop()


exactly = pytest.mark.parametrize("strategy", ["full"], indirect=True)
approximately = pytest.mark.parametrize("strategy", ["apb"], indirect=True)


def test_an_answer(served: Served, vllm: Vllm) -> None:
    """The prompt's tokens and the sampling go there once the document is stored; the answer comes with our fields."""
    answer = served.ask(temperature=0.5, top_p=0.9, seed=3, max_tokens=5)
    assert answer.choices[0].message.content == " one two"
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 3)
    prompt = apb.Prompt.for_model(served.engine.needed_tokenizer(), DOCUMENT, "Who?")
    assert answer.usage.prompt_tokens == len(prompt)
    strategy = served.engine.reading.methods[0].name
    assert (answer.apb["strategy"], answer.apb["exact"]) == (strategy, strategy == "full")
    assert (answer.apb["read_for"], answer.apb["decode"]["method"]) == ("this question", "vllm")
    timing = answer.apb["timing"]
    assert all(timing[part] > 0 for part in ("prefill_s", "storing_s", "first_token_s"))
    (asked,) = vllm.asked
    expected = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 0, "seed": 3, "stop": [], "n": 1}
    assert asked["prompt"] == list(prompt.token_ids)
    assert {name: asked[name] for name in expected} == expected
    (stored,) = Lookup(served.store, lambda each: None, print).documents()
    assert tuple(stored.tokens) == prompt.prefix + prompt.document
    assert tuple(stored.question) == prompt.query


def test_what_is_stored_goes_straight_there(served: Served, vllm: Vllm) -> None:
    """An exact document serves every question, an approximate one its own; what is found says what it was read for."""
    exact = served.engine.reading.methods[0].exact
    served.ask("Who?")
    served.ask("Where was it?")
    assert served.stored() == (1 if exact else 2)
    served.stop_reading()
    again = served.ask("Where was it?")
    assert again.apb["timing"]["prefill_s"] == 0
    assert again.apb["read_for"] == ("another question" if exact else "this question")
    assert (again.apb["exact"], len(vllm.asked), served.forwarding.answering) == (exact, 3, 0)


@exactly
def test_the_model_reads_while_vllm_answers(served: Served, vllm: Vllm) -> None:
    """Another document is read and stored while vLLM has not said a word about the first; pieces come one by one."""
    entered, hold = threading.Event(), threading.Event()

    def first_waits(_: socket.socket) -> None:
        if not entered.is_set():
            entered.set()
            hold.wait(20)

    vllm.before = first_waits
    said: list[Any] = []
    first = threading.Thread(target=lambda: said.append(served.ask()))
    first.start()
    assert entered.wait(20)
    pieces = [each.choices[0].delta.content for each in served.ask(document=OTHER, stream=True)]
    assert (said, [piece for piece in pieces if piece]) == ([], [" one", " two"])
    assert served.stored() == 2
    hold.set()
    first.join(20)
    assert said[0].choices[0].message.content == " one two"


@exactly
def test_a_client_that_leaves(served: Served, vllm: Vllm) -> None:
    """The connection to vLLM is closed with it, which ends the request there, whatever it waits for."""
    entered, gone = threading.Event(), threading.Event()

    def until_closed(connection: socket.socket) -> None:
        entered.set()
        if not connection.recv(1):
            gone.set()

    vllm.before = until_closed
    stream = served.ask(stream=True)
    assert entered.wait(20)
    stream.close()
    assert gone.wait(20)
    vllm.before = lambda connection: None
    assert served.ask().choices[0].message.content == " one two"


@approximately
def test_vllm_reads_by_itself(served: Served, vllm: Vllm) -> None:
    """What it did not take from the store it computed, exactly, and the answer says so."""
    vllm.took = lambda prompt: 16
    answer = served.ask()
    assert (answer.apb["strategy"], answer.apb["exact"]) == ("full", True)
    assert "read_for" not in answer.apb
    (note,) = answer.apb["notes"]
    assert note.startswith("The vLLM server found 16 of ")
    vllm.took = lambda prompt: None
    answer = served.ask()
    assert (answer.apb["exact"], answer.apb["read_for"]) == (False, "this question")
    assert answer.apb["notes"] == ["The vLLM server does not say whether it took the document from the store."]


@exactly
def test_short_prompts_and_full_disks(served: Served, vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chats and short documents go there without being read; what cannot be stored is read there, with a note."""
    assert served.ask(document=DOCUMENT[:500]).apb["exact"]
    assert (served.stored(), len(vllm.asked)) == (0, 1)

    def full(*_: Any) -> None:
        raise apb.InputError("The document cannot be written: the disk is full.")

    monkeypatch.setattr(apb.Document, "save", full)
    answer = served.ask()
    assert answer.choices[0].message.content == " one two"
    assert answer.apb["notes"][0].startswith("The document cannot be written: the disk is full. The vLLM server has")


@exactly
def test_several_answers(served: Served, vllm: Vllm) -> None:
    """vLLM refuses several greedy ones, which are all the same; others it draws."""
    for temperature, asked in ((0, 1), (1, 3)):
        answer = served.ask(n=3, temperature=temperature)
        assert [(each.index, each.message.content) for each in answer.choices] == [(n, " one two") for n in range(3)]
        assert vllm.asked[-1]["n"] == asked


@exactly
def test_when_vllm_fails(served: Served, vllm: Vllm) -> None:
    """Its refusals are the client's, its failures a bad gateway, its absence a service unavailable; in one sentence."""
    with pytest.raises(openai.BadRequestError, match="takes 2,000 together; send a shorter text"):
        served.ask(max_tokens=2000)
    vllm.status = 400
    with pytest.raises(openai.BadRequestError, match="refuses the request: That is too much"):
        served.ask()
    vllm.status = 500
    with pytest.raises(openai.APIStatusError, match="failed: it answered with status 500, That") as failed:
        served.ask()
    assert failed.value.status_code == 502
    vllm.status, vllm.ends = 200, False
    with pytest.raises(openai.APIStatusError, match="its answer broke off") as failed:
        served.ask()
    assert failed.value.status_code == 502
    with pytest.raises(openai.APIError, match="its answer broke off"):
        list(served.ask(stream=True))
    vllm.ends = True
    assert served.ask().choices[0].message.content == " one two"
    vllm.stop()
    with pytest.raises(openai.APIStatusError, match="cannot be reached: Connection refused") as failed:
        served.ask()
    assert (failed.value.status_code, failed.value.response.headers["retry-after"]) == (503, "5")


def test_every_setting_of_sampling() -> None:
    """Is handed on or refused; what is left to the checkpoint is left to it there."""
    asked = parameters(Sampling())
    assert "min_p" not in asked
    assert "repetition_penalty" not in asked
    assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (0, 0, 1)
    values: dict[str, Any] = {
        "max_new_tokens": 3, "temperature": 0.7, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5,
        "frequency_penalty": 0.2, "presence_penalty": 0.3, "stop": ("x",), "top_logprobs": 2, "seed": 2**64 - 1,
        "schema": '{"type": "integer"}',
    }  # fmt: skip
    assert parameters(Sampling(**values)) == {
        "max_tokens": 3, "temperature": 0.7, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5,
        "frequency_penalty": 0.2, "presence_penalty": 0.3, "stop": ["x"], "logprobs": 2, "seed": -1,
        "return_tokens_as_token_ids": True, "structured_outputs": {"json": '{"type": "integer"}'},
    }  # fmt: skip
    for setting in {each.name for each in fields(Sampling)} - set(values):
        with pytest.raises(apb.InputError, match=f"'{setting}' cannot be handed on"):
            parameters(Sampling(**{setting: []}))


def test_log_probabilities() -> None:
    """The likeliest in order, without the chosen token where it is none of them."""
    told = {
        "tokens": ["token_id:5", "token_id:7"],
        "token_logprobs": [-3.0, -0.5],
        "top_logprobs": [{"token_id:5": -3.0, "token_id:8": -0.2}, {"token_id:7": -0.5}],
    }
    assert scored(told, 1) == [Scored(5, -3.0, ((8, -0.2),)), Scored(7, -0.5, ((7, -0.5),))]
    assert scored(None, 1) == scored(told, None) == []


def test_wrong_input(cli: Cli, checkpoint: Path, vllm: Vllm, tmp_path: Path) -> None:  # noqa: F811
    """Said in one sentence before anything is loaded."""
    given = ["serve", "--model", checkpoint, "--port", "0", "--device", "cpu"]
    both = [*given, "--store", tmp_path, "--answer-with"]
    cli(*given, "--answer-with", vllm.url).refused("go together")
    cli(*given, "--answer-with", vllm.url, "--store", tmp_path / "none").refused("is no folder; make it")
    cli(*both, "here:8000").refused("is http://HOST:PORT, not 'here:8000'")
    cli(*both, "http://127.0.0.1:9").refused("127.0.0.1:9 cannot be reached: Connection refused; start it, or leave")
    cli(*both, vllm.url, "--propagate", "0.2").refused("leave propagation out")
    cli(*both, vllm.url, "--tensor-parallel", "2").refused("leave --tensor-parallel out")
    vllm.took = lambda prompt: None
    cli(*both, vllm.url).refused("start it with --enable-prompt-tokens-details")
    vllm.took, vllm.root = (lambda prompt: 0), "some/other"
    cli(*both, vllm.url).refused("serves 'some/other', not")


def test_the_end_waits_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks have nothing more to read after SIGTERM, but answers are still on their way."""
    from apb.distributed import launch

    left, made = [2, 1, 0], list[Ranks]()

    class Answering:
        @property
        def answering(self) -> int:
            return left.pop(0)

    def front_of(ranks: Ranks, forwarding: Any) -> Any:
        made.append(ranks)
        return nullcontext()

    monkeypatch.setattr(launch, "launch", lambda *_, **__: made[0].drain())
    served: Any = None
    serve._run(1, served, lambda submit: Answering(), front_of, "nothing")  # type: ignore[arg-type,return-value]
    assert left == []
