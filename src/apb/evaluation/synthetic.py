"""The generated tasks as a suite: the same samples for every strategy, answered through the public engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


from ..engine import Engine
from ..errors import InputError
from ..prompt import Prompt
from .items import Item, Skipped
from .limits import check_length
from .records import Store
from .runner import Runner
from .settings import Setting, settings
from .statistics import Cell, cell
from .tasks import SHORTEST, TASKS, Question, Sample, TaskError, generate
from .tasks.passages import Passages

__all__ = ["Setting", "check", "check_lengths", "evaluate", "items", "settings"]

NEEDLE_BUDGET = 128
"""Longest answer, in tokens, of the kinds that are not in :data:`BUDGETS`: RULER's for needles."""
BUDGETS = {"variable_tracking": 30, "common_words": 120, "frequent_words": 50, "qa": 32}
"""RULER's longest answers, in tokens, of the other kinds."""
# RULER's limits for lists presuppose that the answer begins with the list, so chat models are given its beginning.
_BEGINNINGS = {
    "variable_tracking": "The variables are:",
    "common_words": "The ten most common words are:",
    "frequent_words": "The three most frequent code words are:",
}
# Length of a sample that is made for its question alone.
_SHORT = 4096
# Samples of different base seeds do not overlap if fewer than this many are drawn.
_SEED_STRIDE = 1_000_000


def check(tasks: Sequence[str], count: int, passages: Passages | None = None) -> None:
    """Raise InputError for an unknown task, no samples, or more samples than the passages have questions."""
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    if count < 1:
        raise InputError(f"Samples must be at least 1, not {count}.")
    if "qa" in tasks and passages is None:
        raise InputError("The task 'qa' asks questions about your own passages; name their file with --passages.")
    if "qa" in tasks and passages is not None and count > len(passages.asked):
        raise InputError(
            f"{count} samples were requested, but the passages have only {len(passages.asked)} questions; "
            "ask for at most as many samples."
        )


def check_lengths(lengths: Sequence[int], config: Any) -> None:
    """Raise InputError if samples are too short for a task, or longer than the model's maximum position."""
    for length in lengths:
        if length < SHORTEST:
            raise InputError(f"A sample of {length} tokens is too short; ask for {SHORTEST} or more.")
        check_length(length, config)


def items(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    count: int,
    seed: int,
    passages: Passages | None = None,
    first: int = 0,
    *,
    budget: int | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Item]:
    """Yield samples ``first`` to ``first + count - 1`` of a task, of at most ``length`` tokens.

    Everything counts: the chat template, the document, the question behind and in front of it (whether a reading asks
    it there or not, so that all readings get the same samples), the answer's beginning and its budget. The same
    arguments give the same samples on every machine.

    Args:
        tokenizer: the model's.
        task, length, count, seed, first: as above.
        passages: for the task qa.
        budget: longest answer, in tokens; RULER's for the task if left out.
        skipped: takes a sentence on the samples that cannot be made, which are then left out.

    Raises:
        TaskError: a sample cannot be made, and ``skipped`` is left out.
    """
    budget = BUDGETS.get(task, NEEDLE_BUDGET) if budget is None else budget
    beginning = _BEGINNINGS.get(task, "") if tokenizer.chat_template is not None else ""

    def measure(document: str, question: Question) -> int:
        prompt = Prompt.for_model(tokenizer, document or ".", question.text, answer_prefix=beginning)
        return len(prompt.question_first) + budget

    failed: list[TaskError] = []
    for number in range(first, first + count):
        options: dict[str, Any] = {"passages": passages, "number": number} if task == "qa" else {}
        try:
            sample = generate(task, tokenizer, length, seed * _SEED_STRIDE + number, measure, **options)
        except TaskError as error:
            if skipped is None:
                raise
            failed.append(error)
            continue
        yield Item(
            suite="synthetic",
            task=task,
            length=length,
            sample=str(sample.seed),
            document=sample.document,
            query=sample.query,
            answers=sample.answers,
            metric="ruler_part" if task == "qa" else "words",
            max_new_tokens=budget,
            answer_prefix=beginning,
            other_query=_another(task, tokenizer, min(length, _SHORT), -sample.seed - 1, passages, number).query,
        )
    if failed and skipped is not None:
        samples = f"{len(failed)} of {count} samples"
        skipped.reasons.append(f"{samples} of {task} at {length:,} tokens were left out: {failed[0]}")


def _another(
    task: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, passages: Passages | None, number: int
) -> Sample:
    """Another sample of a task."""
    if task != "qa" or passages is None:
        return generate(task, tokenizer, length, seed)
    return generate(task, tokenizer, length, seed, passages=passages, number=(number + 1) % len(passages.asked))


def evaluate(
    engine: Engine,
    tasks: Sequence[str],
    lengths: Sequence[int],
    chosen: Sequence[Setting],
    count: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Cell]:
    """Yield a cell per task, length and setting; all settings of a task and length read the same samples."""
    check(tasks, count)
    runner = Runner(engine, "model", chosen, Store())
    done, total = 0, len(tasks) * len(lengths) * len(chosen) * count

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for task, length in product(tasks, lengths):
        rows = list(runner.run(items(runner.tokenizer, task, length, count, seed), tell))
        for column in zip(*rows, strict=True):
            yield cell(column)
