"""A server in a process of its own, as users start it, for the clients that people use.

`make test-clients` runs these tests in an environment that has the clients and neither torch nor this package; its
APB_PYTHON is the interpreter of the one that has. Where a client is not installed its tests are skipped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Seconds within which a server is ready, imports on a busy machine included.
READY_S = 180
MAKE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from byte_checkpoint import TEMPLATE, byte_tokenizer, save_checkpoint
save_checkpoint(Path(sys.argv[2]))
byte_tokenizer(TEMPLATE).save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Server:
    """Where it listens; the API is under ``url``."""

    address: str

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to plain JSON, with which those of clients are compared."""
        data = json.dumps({"max_tokens": 12, "temperature": 0} | body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return dict(json.load(urllib.request.urlopen(request, timeout=60)))

    def chat(self, *turns: tuple[str, str], **body: Any) -> dict[str, Any]:
        """The answer to these turns."""
        messages = [{"role": role, "content": content} for role, content in turns]
        return self.post("/chat/completions", messages=messages, **body)

    def busy(self) -> int:
        """Number of requests that wait or are at work."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return int(sum(float(line.split()[1]) for line in lines if line.split("_requests ")[0] in BUSY))


BUSY = ("apb_waiting", "apb_running")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny model with a chat template."""
    python = os.environ.get("APB_PYTHON", sys.executable)
    folder = tmp_path_factory.mktemp("served")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-c", MAKE, Path(__file__).parents[1], folder / "tiny"], check=True, env=environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        python,
        "-m",
        "apb.cli.main",
        "serve",
        "--device",
        "cpu",
        "--port",
        str(port),
        "--model",
        folder / "tiny",
    ]
    process = subprocess.Popen(command, env=environment)
    server = Server(f"http://127.0.0.1:{port}")
    try:
        _wait(server, process)
        yield server
        assert process.poll() is None, "the server has ended while the clients were at it"
    finally:
        process.terminate()
        process.wait(60)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + READY_S
    while True:
        try:
            urllib.request.urlopen(f"{server.address}/ready", timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None and time.monotonic() < until, "the server does not come up"
            time.sleep(0.5)
