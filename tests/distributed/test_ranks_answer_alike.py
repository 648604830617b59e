"""`apb eval` on several ranks: the same answer to every sample as on one, and one file that a run resumes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apb.evaluation.records import Record, read_records

TASK = ["--task", "single", "--length", "800", "--samples", "3", "--blocks", "3"]
READINGS = ["--strategy", "apb", "--compressor", "query", "--compressor", "recent", "--strategy", "star"]


def evaluated(path: Path, checkpoint: Path, ranks: int) -> list[Record]:
    given = [*TASK, *READINGS, "--model", str(checkpoint), "--device", "cpu", "--ranks", str(ranks), "--out", str(path)]
    command = [sys.executable, "-m", "apb.cli.main", "eval", "synthetic", *given]
    environment = {**os.environ, "APB_TRACEBACK": "1"}
    done = subprocess.run(command, capture_output=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"single") == 3  # rank 0 alone prints
    return list(read_records(path))


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Record]]:
    folder = tmp_path_factory.mktemp("runs")
    runs = {ranks: evaluated(folder / f"{ranks}.jsonl", checkpoint, ranks) for ranks in (1, 2)}
    # Once more, with an answer taken away: only that one is given again.
    path = folder / "2.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4] + lines[5:]))
    runs[0] = evaluated(path, checkpoint, 2)
    return runs


def test_two_ranks_answer_as_one(runs: dict[int, list[Record]]) -> None:
    """Sample by sample, reading by reading: the same prompt, prediction and score."""

    def told(records: list[Record]) -> list[tuple[object, ...]]:
        return [(r.sample, r.prompt, r.strategy, r.compressor, r.prediction, r.score) for r in records]

    assert len(runs[1]) == 9
    assert told(runs[2]) == told(runs[1])
    assert [{record.ranks for record in runs[ranks]} for ranks in (1, 2)] == [{1}, {2}]
    assert len({record.prediction for record in runs[1]}) > 3


def test_ranks_resume_together(runs: dict[int, list[Record]]) -> None:
    """The missing answer is given again by both ranks, and all others stay the lines that they were."""
    expected = [*runs[2][:4], *runs[2][5:]]
    assert runs[0][:8] == expected
    assert (runs[0][8].key, runs[0][8].prediction) == (runs[2][4].key, runs[2][4].prediction)
