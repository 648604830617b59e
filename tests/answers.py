"""Made-up records of answers, for tests of what is done with them."""

from __future__ import annotations

from typing import Any

from apb.evaluation.records import Record


def record(task: str = "t", sample: int = 0, score: float = 100.0, strategy: str = "full", **more: Any) -> Record:
    """A record whose fields are those given, else the same in all."""
    values: dict[str, Any] = {
        "suite": "s",
        "task": task,
        "length": 4096,
        "sample": str(sample),
        "prompt": f"{task} {sample}",
        "prompt_tokens": 4000,
        "model": "m",
        "asked": {"strategy": strategy},
        "strategy": strategy,
        "compressor": None,
        "heads": None,
        "blocks": 1,
        "anchor_length": 0,
        "passing_length": 0,
        "ranks": 1,
        "exact": strategy == "full",
        "device": "d",
        "dtype": "float32",
        "processes": 1,
        "prediction": "1",
        "answers": ("1",),
        "score": score,
        "seconds": 2.0,
        "prefill_s": 1.0,
    }
    return Record(**(values | more))


def run_of(strategy: str, scores: dict[str, list[float]], **more: Any) -> list[Record]:
    """One record for every score: task -> scores of its samples 0, 1, ..."""
    numbered = [(task, number, score) for task, row in scores.items() for number, score in enumerate(row)]
    return [record(task, number, score, strategy, **more) for task, number, score in numbered]
