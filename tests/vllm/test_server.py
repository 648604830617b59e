"""`apb serve --answer-with` beside vLLM's own server: the answers are those of apb alone, eight at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
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
DOCUMENTS = [
    "".join(f"The code of the {name} is {place * 37 + n}. " for n, name in enumerate(("door", "tower", "gate") * 20))
    for place in (11, 12)
]
QUESTIONS = [f"What is the code of the {name}?" for name in ("door", "tower", "gate", "cellar")]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[str]:
    """A server, once it is healthy."""
    with log.open("w") as out:
        env = os.environ | {"PYTHONPATH": str(SOURCE), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 400
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize("strategy", ["full", "apb"])
def test_answers(strategy: str, tmp_path: Path) -> None:
    """Of two documents; each is stored once if it is exact, once for every question if not."""
    model, store = str(shipped_model()), tmp_path / "store"
    store.mkdir()
    options = {"blocks": 4} if strategy == "apb" else {}
    engine = apb.Engine.from_pretrained(model, strategy=strategy, dtype="float32", device="cpu", **options)
    prompts = [apb.Prompt.for_model(engine.tokenizer, text, question) for text in DOCUMENTS for question in QUESTIONS]
    expected = [engine.generate(prompt, max_new_tokens=TOKENS).text for prompt in prompts]
    connector = {
        "kv_connector": "DocumentConnector",
        "kv_connector_module_path": "apb.integrations.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"store": str(store)},
    }
    ports = free_port(), free_port()
    vllm = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(ports[0])]
    vllm += ["--dtype", "float32", "--enforce-eager", "--kv-transfer-config", json.dumps(connector)]
    ours = [sys.executable, "-m", "apb.cli.main", "serve", "--model", model, "--dtype", "float32", "--device", "cpu"]
    ours += ["--strategy", strategy, "--port", str(ports[1]), "--store", str(store)]
    ours += ["--blocks", "4"] if strategy == "apb" else []
    with (
        running(vllm, ports[0], tmp_path / "vllm.log") as there,
        running([*ours, "--answer-with", there], ports[1], tmp_path / "apb.log") as here,
    ):
        client = openai.OpenAI(base_url=f"{here}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id

        def ask(number: int) -> Any:
            return client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": QUESTIONS[number % 4]}],
                max_tokens=TOKENS,
                extra_body={"document": DOCUMENTS[number // 4]},
            )

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        body = {"model": model, "prompt": list(prompts[0].token_ids), "max_tokens": 1, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        direct = urllib.request.Request(f"{there}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(direct, timeout=100) as reply:
            told = json.load(reply)["kv_transfer_params"]["apb"]
    assert [each.choices[0].message.content for each in answers] == expected
    assert {each.apb["exact"] for each in answers} == {strategy == "full"} == {told["exact"]}
    assert len(list(store.iterdir())) == (2 if strategy == "full" else 8)
    assert told["read_for"] == "this question"
    log = (tmp_path / "vllm.log").read_text()
    assert log.count("come from the document") >= 2
