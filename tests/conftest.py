"""What all tests share: quiet, offline, repeatable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# Before torch and transformers are imported, and for the processes that tests start: no test may reach the network, and
# threads must not fight for the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

from command_line import cli
from interpreting import prepare_once

__all__ = ["cli"]

# Without a GPU, Triton's kernels are interpreted. Triton asks for this when it is imported, which torch does not do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: the first example of a test pays for imports. Derandomised: the same examples on every run.
settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu``, or ``gpu(N)`` for several, or ``triton``, are of what nothing stands in for."""
    marker = item.get_closest_marker("gpu")
    needed = 0 if marker is None else marker.args[0] if marker.args else 1
    if torch.cuda.device_count() < needed:
        # Most machines have none, those that run CI among them, and what is marked so runs on nothing else.
        pytest.skip(f"needs NVIDIA GPUs: {needed}")
    if item.get_closest_marker("triton") and find_spec("triton") is None:
        # The tests' extra brings it on Linux alone: there is no Triton for other systems.
        pytest.skip("triton is not installed")
    prepare_once()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint on disk, with a tokenizer of bytes."""
    from byte_checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def server_log() -> Iterator[list[str]]:
    """What servers within this process log, kept from standard error: a line comes when its request is over, which may
    be in the middle of the next test, and that test may look at what is written there."""
    from apb.serving import limits

    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "_log", lines.append)
        yield lines
