"""The generated tasks as a suite: the same samples for every strategy, answered by the engine as a user's would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..engine import Engine
from ..errors import InputError
from ..hf.loading import position_limit
from .items import Item
from .records import Store
from .runner import Runner
from .settings import Setting, settings
from .statistics import Cell, cell
from .tasks import SHORTEST, TASKS, generate
from .tasks.passages import Passages

__all__ = ["Setting", "check", "check_lengths", "evaluate", "items", "settings"]

# Tokens beyond the expected answer that a model may spend before it is cut off.
_SPARE_TOKENS = 8
# Samples of different base seeds do not overlap as long as fewer than this are drawn.
_SEED_STRIDE = 1_000_000


def check(tasks: Sequence[str], count: int, passages: Passages | None = None) -> None:
    """InputError where such samples cannot be drawn."""
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    if count < 1:
        raise InputError(f"Samples must be at least 1, not {count}.")
    if "qa" in tasks and passages is None:
        raise InputError("The task 'qa' asks questions of passages of yours; name their file with --passages.")
    if "qa" in tasks and passages is not None and count > len(passages.asked):
        raise InputError(
            f"{count} samples were asked for but the passages come with {len(passages.asked)} questions; "
            "ask for at most as many samples."
        )


def check_lengths(lengths: Sequence[int], config: Any) -> None:
    """InputError where samples are too short to be made, or longer than the positions of a configuration's model."""
    positions = position_limit(config)
    for length in lengths:
        if length < SHORTEST:
            raise InputError(f"A sample of {length} tokens is too short; ask for {SHORTEST} or more.")
        if positions is not None and length > positions:
            raise InputError(
                f"Samples of {length} tokens do not fit into the model's {positions} positions; ask for at most that."
            )


def items(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    count: int,
    seed: int,
    passages: Passages | None = None,
    first: int = 0,
) -> Iterator[Item]:
    """Samples ``first`` to ``first + count - 1`` of a task, of ``length`` tokens with their answers' room.

    The same for the same arguments, on every machine.
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
    """Yield a cell for every task, length and setting; all settings of a task and length see the same samples."""
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
