"""User-supplied questions: any JSONL file with ``document``, ``query`` and ``answers``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


from .items import Item, Skipped, answers_field, text_field

BUDGET = 64
"""Longest answer, in tokens."""


def items(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    skipped: Skipped,
    count: int | None = None,
    limit: int | None = None,
) -> Iterator[Item]:
    """Yield the samples of the first ``count`` usable lines; the others go to ``skipped``.

    The score is the share of the answers that occur in the prediction as whole words. A sample is listed under the
    length of its document, rounded up to a power of two, or under ``limit``, to which it is truncated in the middle.
    """
    made = 0
    for number, fields in skipped.lines(path):
        if made == count:
            break
        try:
            document, query = text_field(fields, "document"), text_field(fields, "query")
            answers = answers_field(fields, "answers")
            if not document.strip() or not query.strip():
                raise ValueError("has a blank document or query")
        except ValueError as error:
            skipped.add(path, number, str(error))
            continue
        made += 1
        length = limit
        if length is None:
            tokens = len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
            length = 1 << (tokens - 1).bit_length()
        yield Item(
            suite="jsonl",
            task=path.stem,
            length=length,
            sample=str(number),
            document=document,
            query=query,
            answers=answers,
            metric="words",
            max_new_tokens=BUDGET,
            limit=limit,
        )
