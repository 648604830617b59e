"""Several ranks on GPUs, over NCCL: the prefills that ranks on the CPU read, with the same numbers."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The first one that lets ranks share a GPU.
SHARING = 23000


def nccl_version() -> int:
    """Of the library that is loaded, which need not be the one torch was built with."""
    version = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return version.value


KINDS = [
    pytest.param(2, [], marks=pytest.mark.gpu(2), id="a GPU each"),
    pytest.param(2, ["--gpus", "2"], marks=pytest.mark.gpu(4), id="two GPUs each"),
    pytest.param(3, ["--shared"], marks=pytest.mark.gpu, id="one GPU for all"),
]


def start(ranks: int, *options: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ranks.py by torchrun."""
    if "--shared" in options and nccl_version() < SHARING:
        # An older NCCL refuses two ranks on one GPU, and torch chooses the version; with more GPUs the other cases run.
        pytest.skip(f"ranks share a GPU from NCCL {SHARING} on, and this is {nccl_version()}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "tests/gpu/ranks.py"]
    # Where ranks share a GPU, those that wait must leave others room to run.
    sharing = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4"} if "--shared" in options else {}
    return subprocess.run(
        [*command, *options],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "src:tests"} | sharing,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ranks", "options"), KINDS)
def test_ranks_agree_with_the_oracle(ranks: int, options: list[str]) -> None:
    """Logits, gathered cache and decode of every strategy, layers of every kind, long documents in bf16, drawn tokens
    by CUDA graphs; the same to the bit on all ranks."""
    done = start(ranks, *options, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["made"] > 40 * (ranks - 1)
    assert not found["failed"], found["failed"]


@pytest.mark.parametrize(("ranks", "options"), KINDS)
def test_a_failing_rank_ends_all(ranks: int, options: list[str]) -> None:
    """An error on one rank is told and ends a script on all, also where the others wait for that one."""
    done = start(ranks, *options, "--fail", timeout=90)
    assert done.returncode != 0
    assert "RuntimeError: on purpose" in done.stderr
