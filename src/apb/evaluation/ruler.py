"""NVIDIA RULER's own data files (arXiv 2404.06654), with its samples and metrics.

A file is JSONL with ``index``, ``input``, ``outputs``, ``length`` and, in newer versions, ``answer_prefix``. RULER
gives a model ``input`` and, at the beginning of the answer, ``answer_prefix``; the text is the same here to the
letter. Only the query is separate: it is the part of ``input`` from the last match of the task's question
(:data:`KINDS`) to the end, and the text before it is the document. Every task ends with its question, and the last
match counts because some samples begin with an example that has a question too.

RULER can write a chat template into ``input``. It stands before the words that every sample of a task begins with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


from ..errors import InputError
from ..hf.chat import marks_in, unknown_marks
from .items import Item, Skipped, answers_field, check_folder, field, text_field


@dataclass(frozen=True)
class Kind:
    """What the tasks of a kind share.

    Attributes:
        opening: the first words of a sample.
        question: the first words of its question.
        metric: a name in scoring.METRICS.
        max_new_tokens: RULER's ``tokens_to_generate``.
    """

    opening: re.Pattern[str]
    question: re.Pattern[str]
    metric: str
    max_new_tokens: int


_QUESTION = re.compile(r"Question: ")
_GIVEN = re.compile(r"Answer the question based on the given documents")

KINDS = {
    "niah": Kind(
        re.compile(r"(?:A|Some) special magic "),
        re.compile(r"What (?:is|are all) the special magic "),
        "ruler_all",
        128,
    ),
    "vt": Kind(re.compile(r"Memorize and track the chain"), _QUESTION, "ruler_all", 30),
    "cwe": Kind(re.compile(r"Below is a numbered list of words"), _QUESTION, "ruler_all", 120),
    "fwe": Kind(re.compile(r"Read the following coded text"), _QUESTION, "ruler_all", 50),
    "qa": Kind(_GIVEN, _GIVEN, "ruler_part", 32),
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
    check_folder(folder, f"{TASKS[0]}/validation.jsonl or {TASKS[0]}.jsonl and so on")
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


def items(
    path: Path,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    skipped: Skipped,
    count: int | None = None,
    limit: int | None = None,
) -> Iterator[Item]:
    """Yield the first ``count`` samples of a file; bad lines, and a note of a chat template, go to ``skipped``.

    All are listed under one length: that of the longest sample, rounded up to a multiple of 1024 tokens, since RULER
    fills samples up to the requested length; or under ``limit``, to which longer ones are truncated in the middle.

    Raises:
        InputError: the samples hold a chat template that is not of this tokenizer.
    """
    found: list[Item] = []
    for number, fields in skipped.lines(path):
        if len(found) == count:
            break
        try:
            opening, text = without_template(task, text_field(fields, "input"), tokenizer, path)
            found.append(replace(item_of(fields, task, number, text), opening=opening, limit=limit))
        except InputError:  # of the whole file
            raise
        except ValueError as error:
            skipped.add(path, number, str(error))
    if any(item.opening is not None for item in found):
        skipped.notes.append(
            f"the samples of {path} hold a chat template, and are read as they are, without a second one"
        )
    longest = max((item.length for item in found), default=0)
    for item in found:
        yield replace(item, length=limit or -(-longest // 1024) * 1024)


def item_of(fields: Mapping[str, Any], task: str, number: int, text: str) -> Item:
    """The sample of a line, whose ``input`` is ``text``, under its own length; ValueError with what is wrong."""
    kind = KINDS[task.split("_")[0]]
    document, separator, query = split(kind, text)
    length = field(fields, "length")
    if not isinstance(length, int) or length < 1:
        raise ValueError("has no number of tokens in field 'length'")
    return Item(
        suite="ruler",
        task=task,
        length=length,
        sample=str(number),
        document=document,
        query=query,
        answers=answers_field(fields, "outputs"),
        metric=kind.metric,
        max_new_tokens=kind.max_new_tokens,
        separator=separator,
        answer_prefix=_answer_prefix(fields),
    )


def split(kind: Kind, text: str) -> tuple[str, str, str]:
    """(document, white space, question), which together are the text of a sample.

    ValueError if it lacks the task's question or a document before it.
    """
    last = None
    for last in kind.question.finditer(text):  # noqa: B007 - the last match is the result
        pass
    before = text[: last.start()] if last else ""
    document = before.rstrip()
    if last is None or not document:
        raise ValueError("has no text with its task's question after it in field 'input'")
    return document, before[len(document) :], text[last.start() :]


def without_template(task: str, text: str, tokenizer: PreTrainedTokenizerBase, path: Path) -> tuple[str | None, str]:
    """(what a chat template wrote before the sample, the rest); (None, all of it) if there is no template in it.

    A model without a template of its own reads whatever there is as RULER gives it, as text.
    """
    begins = KINDS[task.split("_")[0]].opening.search(text)
    opening = text[: begins.start()] if begins else ""
    marks = marks_in(opening)
    unknown = unknown_marks(tokenizer, marks) if marks else []
    if unknown and tokenizer.chat_template is not None:
        raise InputError(
            f"The samples of {str(path)!r} hold the chat template of another model: this one knows no {unknown[0]!r}; "
            "write them again with --model_template_type base (the model's own template is added here)."
        )
    return (opening, text[len(opening) :]) if marks and not unknown else (None, text)


def _answer_prefix(fields: Mapping[str, Any]) -> str:
    """RULER's own; or lm-evaluation-harness's, which leaves out the space in front and adds it to the prompt."""
    if fields.get("gen_prefix"):
        return " " + text_field(fields, "gen_prefix").lstrip()
    return text_field(fields, "answer_prefix") if fields.get("answer_prefix") else ""
