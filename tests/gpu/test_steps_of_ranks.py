"""Decode by CUDA graphs on two GPUs, with messages between them inside the graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu(2), pytest.mark.timeout(300)]
LAYERS = 3


def start(*options: str) -> subprocess.CompletedProcess[str]:
    """Run steps_of_ranks.py on two GPUs by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "tests/gpu/steps_of_ranks.py"]
    return subprocess.run(
        [*command, *options],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "src:tests"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What rank 0 has found, by way."""
    done = start()
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("messages", ["kernels", "NCCL"])
@pytest.mark.parametrize("shared", ["weights", "sequence"])
def test_graphs_choose_the_same_tokens(found: dict[str, Any], shared: str, messages: str, dtype: str) -> None:
    """Those of steps without graphs, on both ranks, and in fp32 those of one GPU; later sessions capture nothing; a
    step is one graph unless ranks of a sequence send by NCCL."""
    assert "its results are not" not in str(found["lacking"])  # a kernel that is wrong is no missing one
    if messages == "kernels" and not found["kinds"]:
        # Their links, or what torch makes of them, decide; NCCL does the work then, which the other cases show.
        pytest.skip(f"no kernels for messages between these GPUs: {found['lacking']}")
    way = found[f"{shared}, {messages}, torch.{dtype}"]
    assert way["captured"] == [True] * 3
    assert way["alike"]
    assert way["tokens"] == way["plain"]
    assert way["more captures"] == 0
    assert way["captures"] == (LAYERS + 1 if (shared, messages) == ("sequence", "NCCL") else 1)
    if dtype == "float32":
        assert way["tokens"] == way["alone"]


def test_leaving_with_graphs_alive() -> None:
    """The process group is destroyed, and the processes end, while graphs hold its messages."""
    done = start("--leave-graphs")
    assert done.returncode == 0, done.stderr[-3000:]
