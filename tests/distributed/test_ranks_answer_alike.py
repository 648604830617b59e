"""`apb eval` on several ranks: the same answer to every sample as on one, and one file that a run resumes from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from apb.evaluation.records import Record, read_records, write_records
from command_line import Cli

TASK = ["--task", "single", "--length", "800", "--samples", "3", "--blocks", "3"]
READINGS = ["--strategy", "apb", "--compressor", "query", "--compressor", "recent", "--strategy", "star"]


def test_ranks_answer_and_resume_as_one(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Sample by sample, reading by reading: the same prompt, prediction and score, whether answers are written one by
    one or side by side. What is in the file is not answered again, by any of the ranks, and stays as it was."""

    def evaluated(path: Path, *given: object) -> list[Record]:
        place = ["--model", checkpoint, "--device", "cpu", "--out", path]
        done = cli("eval", "synthetic", *TASK, *READINGS, *place, *given)
        assert done.status == 0, done.err
        assert done.out.count("single") == 3  # rank 0 alone prints
        return list(read_records(path))

    def told(records: list[Record]) -> list[tuple[object, ...]]:
        return sorted((r.sample, r.prompt, r.strategy, str(r.compressor), r.prediction, r.score) for r in records)

    one = evaluated(tmp_path / "1.jsonl", "--ranks", 1)
    assert len(one) == 9
    assert len({record.prediction for record in one}) > 3
    path, known = tmp_path / "2.jsonl", replace(one[4], ranks=2, seconds=77.0)
    write_records(path, [known])
    two = evaluated(path, "--ranks", 2, "--batch-size", 4)
    assert two[0] == known
    assert told(two) == told(one)
    assert [{record.ranks for record in records} for records in (one, two)] == [{1}, {2}]
    assert [record.processes for record in two[1:]] == [4] * 8
