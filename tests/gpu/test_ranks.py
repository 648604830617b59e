"""Two ranks on two and on four GPUs: every strategy over NCCL against the dense oracle, the same tokens on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("gpus", [pytest.param(gpus, marks=pytest.mark.gpu(2 * gpus)) for gpus in (1, 2)])
def test_two_ranks_agree_with_the_oracle(gpus):
    """Logits and gathered cache of all strategies in fp32 within 1e-4; sampled tokens alike on both ranks. Also where a
    rank's layers are split over two GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "tests/gpu/ranks.py", str(gpus)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "src:tests"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 8
    assert max(errors.values()) < 1e-4, errors
