"""The generated tasks as a suite: the same samples for every strategy, answered through the public engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


from ..engine import Engine
from ..errors import InputError
from .items import Item
from .limits import check_length
from .records import Store
from .runner import Runner
from .settings import Setting, settings
from .statistics import Cell, cell
from .tasks import SHORTEST, TASKS, generate
from .tasks.passages import Passages

__all__ = ["Setting", "check", "check_lengths", "evaluate", "items", "settings"]

# Tokens that a model may generate beyond the length of the expected answer.
_SPARE_TOKENS = 8
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
) -> Iterator[Item]:
    """Yield samples ``first`` to ``first + count - 1`` of a task, of ``length`` tokens including room for the answer.

    The same arguments give the same samples on every machine.
    """
    for number in range(first, first + count):
        options: dict[str, Any] = {"passages": passages, "number": number} if task == "qa" else {}
        sample = generate(task, tokenizer, length, seed * _SEED_STRIDE + number, **options)
        room = len(tokenizer(sample.answer, add_special_tokens=False)["input_ids"]) + _SPARE_TOKENS
        yield Item(
            suite="synthetic",
            task=task,
            length=length,
            sample=str(sample.seed),
            document=sample.document,
            query=sample.query,
            answers=sample.answers,
            metric="ruler_part" if task == "qa" else "words",
            max_new_tokens=room,
        )


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
