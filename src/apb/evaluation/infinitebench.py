"""InfiniteBench's own data files (arXiv 2402.13718): ten of its tasks with its scoring, and prompts of our own wording.

A file is JSONL with ``id``, ``context``, ``input``, ``answer`` and ``options``. A context that is too long is truncated
in the middle, as in InfiniteBench; the question never is. Math.Calc and Code.Run, which no model solves, are left out,
as in the APB paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .items import Item, Skipped, answers_field, check_folder, field, text_field

Words = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Task:
    """Prompt and scoring of a task.

    Attributes:
        query: function from a line's fields to the question.
        metric: a name in scoring.METRICS.
        max_new_tokens: as in InfiniteBench's scripts.
        before: function from a line's fields to the text before the context.
        answers: function from a line's fields to the right answers.
    """

    query: Words
    metric: str
    max_new_tokens: int
    before: Words = lambda fields: ""
    answers: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda fields: answers_field(fields, "answer")


def _input(fields: Mapping[str, Any]) -> str:
    return text_field(fields, "input")


def _four(fields: Mapping[str, Any]) -> str:
    options = field(fields, "options")
    if not isinstance(options, list) or len(options) != 4:
        raise ValueError("does not have four options in field 'options'")
    return "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))


def _number(fields: Mapping[str, Any]) -> str:
    asked = re.search(r"[Tt]he (.+?) of", _input(fields))
    if asked is None:
        raise ValueError("does not ask for a number of the list in field 'input'")
    return f"Look for the {asked[1]} in this list:\n\n"


def _numeric(fields: Mapping[str, Any]) -> tuple[str, ...]:
    answers = answers_field(fields, "answer")
    try:
        float(answers[0])
    except ValueError as error:
        raise ValueError("has no number in field 'answer'") from error
    return answers


def _option(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Text and letter of the right option, from either of the two forms in the files; ValueError if it is neither."""
    answers = answers_field(fields, "answer")
    if len(answers) == 2 and answers[1] in "ABCD":
        return answers[0], answers[1]
    options = [str(text) for text in field(fields, "options")]
    if len(answers) != 1 or answers[0] not in options:
        raise ValueError("does not have one of its options in field 'answer'")
    return answers[0], "ABCD"[options.index(answers[0])]


TASKS = {
    "passkey": Task(_input, "first_integer", 6),
    "number_string": Task(_input, "first_integer", 12),
    "kv_retrieval": Task(_input, "among_words", 50),
    "longbook_sum_eng": Task(lambda fields: "Write a summary of the book above.", "summary", 1200),
    "longbook_qa_eng": Task(lambda fields: f"{_input(fields)}\nAnswer in a few words.", "english_f1", 40),
    "longbook_choice_eng": Task(
        lambda fields: f"{_input(fields)}\n{_four(fields)}\nName the letter of the right option, nothing else.",
        "chosen_option",
        40,
        answers=_option,
    ),
    "longdialogue_qa_eng": Task(
        lambda fields: "Whose name stands where the script above has $$MASK$$? Give that one name alone.",
        "name_among_words",
        40,
    ),
    "longbook_qa_chn": Task(lambda fields: f"{_input(fields)}\n请用几个字回答。", "chinese_f1", 40),
    "math_find": Task(_input, "first_number", 3, _number, _numeric),
    "code_debug": Task(
        lambda fields: (
            "Exactly one function of the code above has an obvious error put into it. Which one?\n"
            f"{_four(fields)}\nName the letter of the right option, nothing else."
        ),
        "named_function",
        5,
        answers=_option,
    ),
}
"""The ten tasks, by the names of InfiniteBench's files."""


def find(folder: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """Paths of the data files ``TASK.jsonl`` by task; with ``tasks`` empty, of all that exist in the folder.

    Raises:
        InputError: an unknown task, a missing file, or a folder without any.
    """
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    check_folder(folder, "passkey.jsonl and so on")
    for task in tasks:
        if not (folder / f"{task}.jsonl").is_file():
            path = str(folder / f"{task}.jsonl")
            raise InputError(f"InfiniteBench's file for {task!r} is missing: it is expected at {path!r}.")
    found = {task: folder / f"{task}.jsonl" for task in tasks or TASKS if (folder / f"{task}.jsonl").is_file()}
    if not found:
        raise InputError(
            f"There is no InfiniteBench data in {str(folder)!r}: its files are expected there under their own names, "
            "such as passkey.jsonl."
        )
    return found


def items(path: Path, task: str, skipped: Skipped, limit: int, count: int | None = None) -> Iterator[Item]:
    """Yield the first ``count`` samples of a file, truncated to ``limit`` tokens; bad lines go to ``skipped``."""
    how, made = TASKS[task], 0
    for number, fields in skipped.lines(path):
        if made == count:
            break
        try:
            item = Item(
                suite="infinitebench",
                task=task,
                length=limit,
                sample=str(fields.get("id", number)),
                document=how.before(fields) + text_field(fields, "context"),
                query=how.query(fields),
                answers=how.answers(fields),
                metric=how.metric,
                max_new_tokens=how.max_new_tokens,
                limit=limit,
            )
        except ValueError as error:
            skipped.add(path, number, str(error))
            continue
        made += 1
        yield item
