"""`apb serve --answer-with` beside vLLM's own server: the answers are those of apb alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from test_vllm import PYTHON, SOURCE, pytestmark  # noqa: F401

import apb
from apb.hf.loading import shipped_model

TOKENS = 12
NAMES = ("door", "tower", "gate")
# One pair for each strategy: what is stored exactly would serve both.
DOCUMENTS = {
    strategy: [
        "".join(f"The code of the {name} is {place * 37 + n}. " for n, name in enumerate(NAMES * 40))
        for place in places
    ]
    for strategy, places in (("full", (11, 12)), ("apb", (13, 14)))
}
QUESTIONS = [f"What is the code of the {name}?" for name in (*NAMES, "cellar")]
SECONDS = 600


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def within(what: Callable[[], bool]) -> bool:
    """True once it is, which it must become."""
    end = time.monotonic() + SECONDS
    while not what() and time.monotonic() < end:
        time.sleep(0.5)
    return what()


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[str]:
    """A server, once it is ready, until SIGTERM."""

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
        except OSError:
            return False
        return True

    env = os.environ | {"PYTHONPATH": str(SOURCE), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env | {"DO_NOT_TRACK": "1"}, stdout=out, stderr=subprocess.STDOUT)
        try:
            assert within(ready), log.read_text()[-6000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(SECONDS)


def test_answers(tmp_path: Path) -> None:
    """Eight at once on two documents, streamed or not; then other settings, and a client that leaves."""
    model, store = str(shipped_model()), tmp_path / "store"
    store.mkdir()
    connector = {
        "kv_connector": "DocumentConnector",
        "kv_connector_module_path": "apb.integrations.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"store": str(store)},
    }
    port = free_port()
    vllm = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    vllm += ["--dtype", "float32"]
    vllm += ["--enforce-eager", "--max-model-len", "8192", "--kv-transfer-config", json.dumps(connector)]
    vllm += ["--enable-prompt-tokens-details"]
    with running(vllm, port, tmp_path / "vllm.log") as there:
        answers_of("full", model, store, there, tmp_path)
        answers_of("apb", model, store, there, tmp_path)


def answers_of(strategy: str, model: str, store: Path, there: str, folder: Path) -> None:
    options = {"blocks": 4} if strategy == "apb" else {}
    engine = apb.Engine.from_pretrained(model, strategy=strategy, dtype="float32", device="cpu", **options)
    texts, before = DOCUMENTS[strategy], len(list(store.iterdir()))
    asked = [(text, question) for text in texts for question in QUESTIONS]
    prompts = [apb.Prompt.for_model(engine.needed_tokenizer(), *each) for each in asked]
    expected = [engine.generate(prompt, max_new_tokens=TOKENS) for prompt in prompts]
    port = free_port()
    ours = [sys.executable, "-m", "apb.cli.main", "serve", "--model", model, "--dtype", "float32", "--device", "cpu"]
    ours += ["--strategy", strategy, "--port", str(port), "--store", str(store), "--answer-with", there]
    ours += ["--blocks", "4"] if strategy == "apb" else []
    with running(ours, port, folder / f"{strategy}.log") as here:
        client = openai.OpenAI(base_url=f"{here}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        assert within(lambda: ready(here))
        name = client.models.list().data[0].id

        def ask(number: int, **more: Any) -> Any:
            text, question = asked[number]
            messages: Any = [{"role": "user", "content": question}]
            more = {"max_tokens": TOKENS, **more}
            return client.chat.completions.create(model=name, messages=messages, extra_body={"document": text}, **more)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        assert [each.choices[0].message.content for each in answers] == [each.text for each in expected]
        assert {each.apb["exact"] for each in answers} == {strategy == "full"}
        assert not any(each.apb.get("notes") for each in answers), answers[0].apb
        assert len(list(store.iterdir())) - before == (2 if strategy == "full" else 8)
        pieces = [each.choices[0] for each in ask(1, stream=True) if each.choices]
        assert "".join(each.delta.content or "" for each in pieces) == expected[1].text
        likely = ask(2, n=2, logprobs=True, top_logprobs=3)
        assert [each.message.content for each in likely.choices] == [expected[2].text] * 2
        scores = engine.generate(prompts[2], max_new_tokens=TOKENS, top_logprobs=3).scored
        told = likely.choices[0].logprobs.content
        assert [[top.logprob for top in each.top_logprobs] for each in told] == [
            [pytest.approx(value, abs=1e-3) for _, value in each.top] for each in scores
        ]
        stopped = ask(0, stop=[expected[0].text[-3:]]).choices[0]
        assert (stopped.finish_reason, expected[0].text.startswith(stopped.message.content)) == ("stop", True)
        drawn = [ask(0, temperature=1.0, top_p=0.9, seed=3).choices[0].message.content for _ in range(2)]
        assert drawn[0] == drawn[1]
        stream = ask(3, stream=True, max_tokens=6000)
        assert any(each.choices and each.choices[0].delta.content for each in stream)
        assert running_there(there) == 1
        stream.close()
        assert within(lambda: running_there(there) == 0)


def ready(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/ready", timeout=5).close()
    except OSError:
        return False
    return True


def running_there(url: str) -> int:
    """Requests that vLLM is working on."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{")))
