"""`python -m apb.training.heads.generated OUT.jsonl`: data for the shipped model's heads, from the task generators."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...errors import at_least
from ...evaluation.tasks import generate
from ...hf.loading import load_tokenizer, shipped_model

TASKS = ("headings", "multikey", "multiquery", "multivalue", "single", "variable_tracking")
# Evaluation uses seeds from 0 on, a million apart for each --seed; this is far above all of them.
FIRST_SEED = 10**12


@lru_cache
def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer, loaded once per process."""
    return load_tokenizer(model)


def line(index: int, model: str, length: int) -> str:
    """Sample ``index`` as a line of JSON; half of the samples have the question in front too, as in APB's anchor."""
    tokenizer = tokenizer_of(model)
    task, room = TASKS[index % len(TASKS)], length - 32
    sample = generate(task, tokenizer, room, FIRST_SEED + index)
    in_front = index // len(TASKS) % 2 == 1
    document = f"\n\n{sample.query}{sample.document}" if in_front else sample.document
    return json.dumps({"document": document, "query": sample.query, "answer": sample.answer}) + "\n"


def main() -> None:
    """Write the file, with ``--jobs`` processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--length", type=int, default=10240, help="tokens of a sample")
    parser.add_argument("--model", default=str(shipped_model()), help="whose tokenizer counts the tokens")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    at_least("samples", arguments.samples, 1)
    write(
        arguments.out, partial(line, model=arguments.model, length=arguments.length), arguments.samples, arguments.jobs
    )


def write(out: Path, make: Callable[[int], str], samples: int, jobs: int) -> None:
    """Write the lines of so many samples to a file, made by several processes; ``make``: from an index to a line."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, out.open("w") as file:
        file.writelines(pool.map(make, range(samples), chunksize=16))


if __name__ == "__main__":
    main()
