"""`apb eval` on several ranks: the same answer to every sample as on one, and one file that a run resumes from."""

from __future__ import annotations

from pathlib import Path

from apb.evaluation.records import Record, read_records
from command_line import Cli

TASK = ["--task", "single", "--length", "800", "--samples", "3", "--blocks", "3"]
READINGS = ["--strategy", "apb", "--compressor", "query", "--compressor", "recent", "--strategy", "star"]


def test_ranks_answer_and_resume_as_one(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Sample by sample, reading by reading: the same prompt, prediction and score. An answer that is missing is given
    again by both ranks, and all others stay the lines that they were."""

    def evaluated(ranks: int) -> list[Record]:
        path = tmp_path / f"{ranks}.jsonl"
        given = ["--model", checkpoint, "--device", "cpu", "--ranks", ranks, "--out", path]
        done = cli("eval", "synthetic", *TASK, *READINGS, *given)
        assert done.status == 0, done.err
        assert done.out.count("single") == 3  # rank 0 alone prints
        return list(read_records(path))

    def told(records: list[Record]) -> list[tuple[object, ...]]:
        return [(r.sample, r.prompt, r.strategy, r.compressor, r.prediction, r.score) for r in records]

    one, two = evaluated(1), evaluated(2)
    assert len(one) == 9
    assert told(two) == told(one)
    assert [{record.ranks for record in records} for records in (one, two)] == [{1}, {2}]
    assert len({record.prediction for record in one}) > 3

    path = tmp_path / "2.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4] + lines[5:]))
    again = evaluated(2)
    assert again[:8] == [*two[:4], *two[5:]]
    assert (again[8].key, again[8].prediction) == (two[4].key, two[4].prediction)
