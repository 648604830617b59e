"""Two machines under torchrun, as far as one can play them: two network namespaces, 100 Mbit/s and 20 ms apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import apb
import machine_work
from apb.hf.counting import model_shape
from apb.planning.cost import predict
from apb.planning.plan import Plan

NAMES = [f"apb-test-{os.getpid()}-{end}" for end in range(2)]
LINKS = [f"apbt{os.getpid() % 100000}{end}" for end in "ab"]
# The wire's end of each machine's link.
PLUGS = [f"{link}w" for link in LINKS]
RATE, DELAY = 100e6, 0.020  # bits a second; seconds, each way


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """Two namespaces with a wire between them; skips where they cannot be made."""
    wire = None
    try:
        try:
            _connect()
        except (subprocess.CalledProcessError, OSError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            # Only Linux has namespaces, and only root, with iproute2, may make them: tests must run without these too.
            pytest.skip(f"network namespaces cannot be made here: {reason.strip()}")
        wire = _wire()
        yield NAMES
    finally:
        if wire is not None:
            wire.kill()
            wire.communicate()
        for name in NAMES:  # and with them their links
            _remove(name)


def _connect() -> None:
    """Make the machines, each with a link that ends in a plug of the wire."""
    for number, (name, link, plug) in enumerate(zip(NAMES, LINKS, PLUGS, strict=True), 1):
        run("ip", "netns", "add", name)
        run("ip", "link", "add", plug, "type", "veth", "peer", link, "netns", name)
        run("ip", "link", "set", plug, "up")
        run("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
        for device in (link, "lo"):
            run("ip", "-n", name, "link", "set", device, "up")


def _remove(name: str) -> None:
    """Take a machine away, if it was made."""
    if shutil.which("ip"):
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _wire() -> subprocess.Popen[str]:
    """The wire between the two plugs, running."""
    program = Path(__file__).parent / "slow_wire.py"
    wire = subprocess.Popen(
        [sys.executable, str(program), *PLUGS, str(RATE), str(DELAY)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wire.stdout is not None
    assert wire.stdout.readline() == "ready\n", wire.communicate()[1]
    return wire


@pytest.fixture(scope="module")
def results(machines: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each machine got and sent."""
    folder = tmp_path_factory.mktemp("machines")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    started = []
    for rank, (name, link) in enumerate(zip(machines, LINKS, strict=True)):
        torchrun = ["torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        meeting = ["--master-addr", "10.77.0.1", "--master-port", "29571"]
        work = [str(here / "machine_work.py"), str(folder), link]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", *torchrun, *meeting, *work]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": link, "PYTHONPATH": path}
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_the_wire_is_slow(results: list[dict[str, Any]]) -> None:
    """The network is what it is meant to be: a message takes the wire's delay and its bits' time, there and back."""
    assert results[0]["number_s"] > 2 * DELAY
    assert results[0]["megabyte_s"] > 2 * (DELAY + 8e6 / RATE)


@pytest.mark.parametrize("name", machine_work.READINGS)
def test_the_same_answer(results: list[dict[str, Any]], name: str) -> None:
    """Both machines have the logits of one."""
    engine = apb.Engine.from_model(machine_work.model(name), **machine_work.READINGS[name])
    expected = engine.prefill(machine_work.PROMPT).logits
    for result in results:
        torch.testing.assert_close(torch.tensor(result[name]["logits"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", machine_work.READINGS)
def test_the_traffic_is_what_the_plan_predicts(results: list[dict[str, Any]], name: str) -> None:
    """What left each machine during prefill, headers apart, within 5 % of the predicted bytes."""
    prompt = machine_work.PROMPT
    plan = Plan.build(
        len(prompt.prefix), len(prompt.document), len(prompt.query), ranks=2, **machine_work.READINGS[name]
    )
    predicted = predict(plan, model_shape(machine_work.model(name).config), element_bytes=4, ranks_per_host=1)
    for result, rank in zip(results, predicted.ranks, strict=True):
        assert rank.network_bytes == rank.sent_bytes
        assert result[name]["sent"] == pytest.approx(rank.network_bytes, rel=0.05)
