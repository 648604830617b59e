"""NVIDIA RULER's own data files (arXiv 2404.06654): its samples, its metrics.

A file is JSONL with ``index``, ``input``, ``outputs``, ``length`` and, in newer versions, ``answer_prefix``. RULER
hands a model ``input`` and, after what opens the answer, ``answer_prefix``. Here the question is a part of its own, and
is cut off ``input`` by rule: from the last place where the task's question begins (:data:`QUESTIONS`) to the end. What
stands before it is the document. Every task ends with its question, and the last place counts, because some samples
begin with an example that has one too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .items import Item, Skipped, answers_field, field, text_field

NIAH = re.compile(r"What (?:is|are all) the special magic ")
QUESTION = re.compile(r"Question: ")
GIVEN = re.compile(r"Answer the question based on the given documents")

# Kind of task -> where its question begins, its metric, the longest answer in tokens (RULER's constants).
QUESTIONS = {
    "niah": (NIAH, "ruler_all", 128),
    "vt": (QUESTION, "ruler_all", 30),
    "cwe": (QUESTION, "ruler_all", 120),
    "fwe": (QUESTION, "ruler_all", 50),
    "qa": (GIVEN, "ruler_part", 32),
}
TASKS = (
    *(f"niah_single_{number}" for number in (1, 2, 3)),
    *(f"niah_multikey_{number}" for number in (1, 2, 3)),
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)
"""RULER's thirteen tasks, by the names of its files."""


def find(folder: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """The data file of each task: ``TASK/validation.jsonl``, ``TASK/test.jsonl`` or ``TASK.jsonl`` in the folder.

    Without names all that are there.
    """
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    found = {}
    for task in tasks or TASKS:
        places = [folder / task / "validation.jsonl", folder / task / "test.jsonl", folder / f"{task}.jsonl"]
        path = next((place for place in places if place.is_file()), None)
        if path is not None:
            found[task] = path
        elif tasks:
            raise InputError(f"RULER's file for {task!r} is missing: it is expected at {str(places[0])!r}.")
    if not found:
        raise InputError(
            f"No data of RULER is in {str(folder)!r}: files are expected as "
            f"{str(folder / TASKS[0] / 'validation.jsonl')!r}, as its scripts/data/prepare.py writes them."
        )
    return found


def split(kind: str, text: str) -> tuple[str, str]:
    """Document and question of an ``input``; ValueError where the task's question is not in it."""
    begins = QUESTIONS[kind][0]
    last = None
    for last in begins.finditer(text):  # noqa: B007 - the last one is what is wanted
        pass
    document = text[: last.start()].strip() if last else ""
    if last is None or not document:
        raise ValueError(f"has no question of the kind {kind!r} after a text in field 'input'")
    return document, text[last.start() :].strip()


def items(
    path: Path, task: str, skipped: Skipped, count: int | None = None, limit: int | None = None
) -> Iterator[Item]:
    """The first ``count`` samples of a file; lines that are not as they should be go to ``skipped``.

    All are listed under one length: the longest one's, rounded up to 1024 tokens, as RULER fills every sample up to the
    length that was asked of it; or under ``limit``, to which longer ones are cut in the middle.
    """
    lines: list[tuple[int, tuple[str, str, tuple[str, ...], str, int]]] = []
    for number, fields in skipped.lines(path):
        if len(lines) == count:
            break
        try:
            lines.append((number, parse(fields, task)))
        except ValueError as error:
            skipped.add(path, number, str(error))
    longest = max((length for _, (_, _, _, _, length) in lines), default=0)
    _, metric, room = QUESTIONS[task.split("_")[0]]
    for number, (document, query, answers, prefix, _) in lines:
        yield Item(
            suite="ruler",
            task=task,
            length=limit or -(-longest // 1024) * 1024,
            sample=str(number),
            document=document,
            query=query,
            answers=answers,
            metric=metric,
            max_new_tokens=room,
            answer_prefix=prefix,
            limit=limit,
        )


def parse(fields: Mapping[str, Any], task: str) -> tuple[str, str, tuple[str, ...], str, int]:
    """Document, question, answers, answer prefix and length of a line; ValueError for what is wrong with it."""
    document, query = split(task.split("_")[0], text_field(fields, "input"))
    length = field(fields, "length")
    if not isinstance(length, int):
        raise ValueError("has no whole number in field 'length'")
    return document, query, answers_field(fields, "outputs"), str(fields.get("answer_prefix") or ""), length
