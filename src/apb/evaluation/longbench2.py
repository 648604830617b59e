"""LongBench v2's own data file (arXiv 2412.15204): questions with four options, with its prompt and its scoring.

The file is ``data.json``, a list of objects, or the same objects as JSONL, with ``_id``, ``context``, ``question``,
``choice_A`` to ``choice_D``, ``answer`` (a letter) and ``length`` (short, medium or long), which are the tasks here.
The prompt is that of LongBench's ``prompts/0shot.txt`` to the letter. A context that is too long loses its middle;
LongBench cuts the whole prompt there, whose middle is the context's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import InputError
from .items import Item, Skipped, text_field

TASKS = ("short", "medium", "long")
"""LongBench's classes of length: up to 32K words, up to 128K, and beyond."""

LETTERS = ("A", "B", "C", "D")
_BEFORE = "Please read the following text and answer the question below.\n\n<text>\n"
_FORM = 'Format your response as follows: "The correct answer is (insert answer here)".'


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise InputError for an unknown task."""
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")


def items(path: Path, tasks: Sequence[str], skipped: Skipped, limit: int, count: int | None = None) -> Iterator[Item]:
    """Yield the first ``count`` samples of each task, task by task, truncated to ``limit`` tokens.

    All tasks if ``tasks`` is empty. Bad entries go to ``skipped``.
    """
    found: dict[str, list[Item]] = {task: [] for task in tasks or TASKS}
    for number, fields in skipped.entries(path):
        try:
            item = item_of(fields, number, limit)
        except ValueError as error:
            skipped.add(path, number, str(error))
            continue
        if item.task in found and len(found[item.task]) != count:
            found[item.task].append(item)
    yield from chain.from_iterable(found.values())


def item_of(fields: Mapping[str, Any], number: int, limit: int) -> Item:
    """The sample of an entry; ValueError with what is wrong."""
    task, answer = text_field(fields, "length"), text_field(fields, "answer")
    if task not in TASKS:
        raise ValueError("has neither short nor medium nor long in field 'length'")
    if answer not in LETTERS:
        raise ValueError("has none of the letters A, B, C and D in field 'answer'")
    context = text_field(fields, "context").strip()
    if not context:
        raise ValueError("has a blank context")
    options = "\n".join(f"({letter}) {text_field(fields, f'choice_{letter}').strip()}" for letter in LETTERS)
    asked = f"What is the correct answer to this question: {text_field(fields, 'question').strip()}"
    return Item(
        suite="longbench2",
        task=task,
        length=limit,
        sample=str(fields.get("_id", number)),
        document=_BEFORE + context,
        separator="\n",
        query=f"</text>\n\n{asked}\nChoices:\n{options}\n\n{_FORM}",
        answers=(answer,),
        metric="stated_letter",
        max_new_tokens=128,
        limit=limit,
    )
