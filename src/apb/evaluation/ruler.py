"""NVIDIA RULER's own data files (arXiv 2404.06654), with its samples and metrics.

A file is JSONL with ``index``, ``input``, ``outputs``, ``length`` and, in newer versions, ``answer_prefix``. RULER
gives a model ``input`` and, at the beginning of the answer, ``answer_prefix``. Here the query is separate: it is the
part of ``input`` from the last match of the task's question (:data:`QUESTIONS`) to the end, and the text before it is
the document. Every task ends with its question, and the last match counts because some samples begin with an example
that has a question too.
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

# Kind of task -> beginning of its question, metric, answer limit in tokens (RULER's constants).
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
    """Paths of the data files by task; with ``tasks`` empty, of all that exist in the folder.

    A file is ``TASK/validation.jsonl``, ``TASK/test.jsonl`` or ``TASK.jsonl``.

    Raises:
        InputError: an unknown task, a missing file, or a folder without any.
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
            f"There is no RULER data in {str(folder)!r}: files are expected as "
            f"{str(folder / TASKS[0] / 'validation.jsonl')!r}, as its scripts/data/prepare.py writes them."
        )
    return found


def split(kind: str, text: str) -> tuple[str, str]:
    """(document, question) of an ``input``; ValueError if it lacks the task's question or a document before it."""
    begins = QUESTIONS[kind][0]
    last = None
    for last in begins.finditer(text):  # noqa: B007 - the last match is the result
        pass
    document = text[: last.start()].strip() if last else ""
    if last is None or not document:
        raise ValueError(f"has no text with a question of the kind {kind!r} after it in field 'input'")
    return document, text[last.start() :].strip()


def items(
    path: Path, task: str, skipped: Skipped, count: int | None = None, limit: int | None = None
) -> Iterator[Item]:
    """Yield the first ``count`` samples of a file; bad lines go to ``skipped``.

    All are listed under one length: that of the longest sample, rounded up to a multiple of 1024 tokens, since RULER
    fills samples up to the requested length; or under ``limit``, to which longer ones are truncated in the middle.
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
    """(document, question, answers, answer prefix, length) of a line; ValueError with the reason if it is bad."""
    document, query = split(task.split("_")[0], text_field(fields, "input"))
    length = field(fields, "length")
    if not isinstance(length, int):
        raise ValueError("has no integer in field 'length'")
    return document, query, answers_field(fields, "outputs"), str(fields.get("answer_prefix") or ""), length
