"""`apb generate` on several ranks as its users start it: the same answer, and an end in good order whatever happens."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import openai
import psutil
import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from apb.distributed import launch
from command_line import Cli

TEXT = "The lighthouse keeper of Orrin was called Maud. " * 12
ANSWER = ["--max-new-tokens", "12", "--json", "--temperature", "1", "--seed", "5"]
# Long enough not to be done before a test has done its harm.
ENDLESS = ["--max-new-tokens", "3400"]


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path) -> list[str]:
    """`generate` on the tiny checkpoint, in three blocks."""
    document = tmp_path / "document.txt"
    document.write_text(TEXT)
    given = {"document": document, "query": "Who?", "model": checkpoint, "blocks": 3, "device": "cpu"}
    return ["apb.cli.main", "generate", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def answer(*command: str) -> Any:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_ranks_do_not_change_the_answer(arguments: list[str], cli: Cli) -> None:
    """One rank, two of our own, and two of torchrun's give the same tokens; stdout holds one JSON object each time."""
    one = cli(*arguments[1:], *ANSWER).json
    two = answer(*arguments, *ANSWER, "--ranks", "2")
    torchrun = answer("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments, *ANSWER)
    assert one["token_ids"] == two["token_ids"] == torchrun["token_ids"]
    assert [report["plan"]["ranks"] for report in (one, two, torchrun)] == [1, 2, 2]


def test_scores_that_are_not_finite_are_said_once(
    arguments: list[str], cli: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    """On two ranks in the words of one: the sentence alone, without an answer, status 1."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    given = [str(broken) if part == str(checkpoint) else part for part in arguments]
    done = cli(*given[1:], "--max-new-tokens", 2, "--ranks", 2)
    assert (done.status, done.out) == (1, "")
    (said,) = [line for line in done.err.splitlines() if line.startswith("apb: ")]
    assert said.startswith("apb: The model's scores for the next token, 0 tokens into the answer, are NaN")
    assert said.endswith("or other weights.")


def test_torchrun_refuses_once(arguments: list[str]) -> None:
    """What all ranks find wrong one of them says; what only another one can see, that one says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    wrong = [*torchrun, *arguments, "--blocks", "0"]
    done = subprocess.run(wrong, capture_output=True, timeout=100, check=False, text=True)
    assert done.returncode != 0
    assert done.stderr.count("apb: Blocks must be at least 1, not 0.") == 1
    alone = [sys.executable, "-m", *arguments, "--blocks", "0"]
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    done = subprocess.run(alone, capture_output=True, timeout=100, check=False, text=True, env=os.environ | ranks)
    assert (done.returncode, done.stderr) == (2, "apb: Blocks must be at least 1, not 0.\n")


@contextmanager
def answering(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """An `apb` on two ranks that has begun to answer, and its ranks; nothing of it is left afterwards."""
    command = [sys.executable, "-m", *arguments, *ENDLESS, "--ranks", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    started: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        first = process.stdout.read(1)  # returns when rank 0 prints, or when all have ended
        started = psutil.Process(process.pid).children(recursive=True)
        assert first, process.communicate()[1].decode()
        yield process, [child for child in started if "spawn_main" in " ".join(child.cmdline())]
    finally:
        end(process, started)


def end(process: subprocess.Popen[bytes], started: list[psutil.Process]) -> None:
    """Leave nothing of a command behind."""
    process.kill()
    for child in started:
        if child.is_running():
            child.kill()
    process.wait()


def ended(process: subprocess.Popen[bytes], since: float) -> tuple[int, list[str]]:
    """Exit status and standard error of a process that must end within 30 seconds.

    Without the progress bar and a server's lines of requests.
    """
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - since < 30
    aside = re.compile(r"\s*$|Reading|apb: \w{32} (GET|POST) /v1/")
    return process.returncode, [line for line in err.decode().splitlines() if not aside.match(line)]


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


def test_a_killed_rank_ends_all(arguments: list[str]) -> None:
    """A rank that dies ends the command within 30 seconds: status 1, one line that names it, no process left."""
    with answering(arguments) as (process, ranks):
        assert len(ranks) == 2
        since = time.monotonic()
        ranks[1].send_signal(signal.SIGKILL)
        status, lines = ended(process, since)
        assert (status, len(lines)) == (1, 1), lines
        assert re.fullmatch(r"apb: Rank [01] of 2 was killed by SIGKILL; the other ranks were ended\.", lines[0]), lines
        assert all_gone(ranks)


@pytest.mark.parametrize("whom", ["the parent", "all, as a terminal does"])
def test_ctrl_c_ends_all(arguments: list[str], whom: str) -> None:
    """Ctrl-C ends the command and every process it started: status 130, "interrupted", no traceback."""
    with answering(arguments) as (process, ranks):
        since = time.monotonic()
        if whom == "the parent":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        status, lines = ended(process, since)
        assert (status, lines) == (130, ["apb: interrupted"])
        assert all_gone(ranks)


def test_termination_ends_all(arguments: list[str]) -> None:
    """SIGTERM, as a scheduler sends it, ends every process: status 1 and one line."""
    with answering(arguments) as (process, ranks):
        since = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status, lines = ended(process, since)
        assert (status, len(lines)) == (1, 1), lines
        assert "SIGTERM" in lines[0]
        assert all_gone(ranks)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_who_failed_does_not_wait(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL is taken down by all ranks together: one that failed must end without, and gloo's as ever."""
    ended, destroyed = Mock(), Mock()
    monkeypatch.setattr(os, "_exit", ended)
    for name, value in {"is_initialized": lambda: True, "get_backend": lambda: backend}.items():
        monkeypatch.setattr(dist, name, value)
    monkeypatch.setattr(dist, "destroy_process_group", destroyed)
    launch.end(3)
    assert ended.call_args_list == [call(3)] * (backend == "nccl")
    launch._leave_at_exit()
    assert destroyed.call_count == 1
    monkeypatch.setattr(sys, "last_value", RuntimeError(), raising=False)
    launch._leave_at_exit()
    assert destroyed.call_count == 1 + (backend == "gloo")


class Serving:
    """`apb serve` on the tiny checkpoint, with a client that does not ask again by itself."""

    def __init__(self, arguments: list[str], *more: str) -> None:
        model = dict(pairwise(arguments))["--model"]
        command = ["apb.cli.main", "serve", "--model", model, "--blocks", "3", "--device", "cpu", "--port", "0", *more]
        self.name = Path(model).name
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command], stderr=subprocess.PIPE, start_new_session=True
        )
        self.started: list[psutil.Process] = []

    def serving(self) -> str:
        """The line that says where, once it serves."""
        assert self.process.stderr is not None
        lines = iter(self.process.stderr.readline, b"")
        self.line = next(line.decode().strip() for line in lines if b"serving" in line)
        self.address = re.findall(r"http://[^,]*", self.line)[0]
        self.started += psutil.Process(self.process.pid).children(recursive=True)
        return self.line

    def ask(self, text: str, question: str = "Who?", **more: Any) -> Any:
        client = openai.OpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=60)
        messages: list[Any] = [{"role": "user", "content": question}]
        return client.chat.completions.create(model=self.name, messages=messages, extra_body={"document": text}, **more)

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", int(re.findall(r":(\d+)/v1", self.address)[0]), timeout=20)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def ranks(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in found if "spawn_main" in " ".join(each.cmdline())]


@contextmanager
def servers(arguments: list[str], count: int, *more: str) -> Iterator[list[Serving]]:
    """Servers that start side by side; nothing of them is left afterwards."""
    every = [Serving(arguments, *more) for _ in range(count)]
    try:
        yield every
    finally:
        for each in every:
            end(each.process, each.started)


def test_serving_on_two_ranks(arguments: list[str], cli: Cli, tmp_path: Path) -> None:
    """The answers of `apb generate`, one after the other and at once, also after clients have gone away.

    If a rank is killed only the request in flight fails; all ranks are started again and answer, by what they have
    read before. SIGTERM then lets them answer what they are at.
    """
    kept = TEXT * (1 + 1024 // len(TEXT))  # long enough to be kept
    folder = ["--documents", str(tmp_path / "kept")]
    with servers(arguments, 1, "--ranks", "2", *folder) as (server,):
        line = server.serving()
        assert re.search(r"at http://127\.0\.0\.1:(\d+)/v1, 2 ranks$", line), line
        one = cli(*arguments[1:], "--max-new-tokens", 12, "--json").json
        ask = partial(server.ask, TEXT, max_tokens=12)
        assert ask().choices[0].message.content == one["text"]
        assert ask(temperature=1e-40).choices[0].message.content == one["text"]
        pieces = ask(max_tokens=3000, stream=True)
        next(pieces)
        pieces.close()
        again = ask()
        assert again.choices[0].message.content == one["text"]
        assert again.apb["plan"] == one["plan"] | {"ranks": 2}
        with ThreadPoolExecutor() as clients:  # at once, and some of them go
            left = [clients.submit(lambda: next(ask(max_tokens=300, stream=True)).id) for _ in range(2)]
            answers = [clients.submit(each) for each in (ask, partial(ask, question="Where?")) * 3]
            texts = [each.result().choices[0].message.content for each in answers]
            assert all(each.result() for each in left)
        assert texts == [one["text"], ask(question="Where?").choices[0].message.content] * 3

        before = server.ask(kept, max_tokens=5).choices[0].message.content
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob("kept/*/*/document.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        old = server.ranks()
        pieces = server.ask(kept, max_tokens=2800, stream=True)
        next(pieces)
        old[-1].send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIError, match="A rank was lost while it worked on this request"):
            list(pieces)
        assert server.get("/ready")[0] == 503
        with pytest.raises(openai.InternalServerError, match="ranks are being started") as refused:
            server.ask(kept, max_tokens=5)
        assert refused.value.status_code == 503 and refused.value.response.headers["Retry-After"] == "15"
        assert server.serving() == line and server.get("/ready")[0] == 200
        assert server.ask(kept, max_tokens=5).choices[0].message.content == before
        assert "apb_document_hits 1.0" in server.get("/metrics")[1]
        assert all_gone(old)

        pieces = server.ask(kept, max_tokens=200, stream=True)
        next(pieces)
        server.process.send_signal(signal.SIGTERM)
        assert list(pieces)[-1].choices[0].finish_reason == "length"
        assert server.process.wait(60) == 0 and all_gone(server.started)


def test_a_server_that_is_told_twice_ends_at_once(arguments: list[str]) -> None:
    """SIGTERM lets a long answer go on and takes no other request; a second one, or Ctrl-C, ends the answer as well."""
    told = {
        signal.SIGTERM: (1, ["apb: SIGTERM was received; all ranks were ended."]),
        signal.SIGINT: (130, ["apb: interrupted"]),
    }
    with servers(arguments, len(told), "--ranks", "1") as every:
        for server, (number, said) in zip(every, told.items(), strict=True):
            server.serving()
            pieces = server.ask(TEXT, max_tokens=3000, stream=True)
            next(pieces)
            server.process.send_signal(signal.SIGTERM)
            while server.get("/ready")[0] == 200:
                time.sleep(0.05)
            with pytest.raises(openai.InternalServerError) as refused:
                server.ask(TEXT, max_tokens=1)
            assert refused.value.status_code == 503
            next(pieces)
            since = time.monotonic()
            server.process.send_signal(number)
            assert ended(server.process, since) == said
            assert all_gone(server.started)
