"""Samples of the tasks: `generate` makes one of a given length, `score` scores a prediction."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from random import Random
from typing import Any

from .chains import variable_tracking
from .chapters import headings
from .filler import FILLERS
from .haystacks import (
    multikey_all,
    multikey_codes,
    multikey_few,
    single_code,
    single_needles,
    single_noise,
    single_prose,
)
from .infinite import extreme_number, kv_retrieval, number_string, passkey
from .material import Builder, Encoder, Material, Question, TaskError, Tokenizer, weave
from .needles import multikey, multiquery, multivalue, single
from .passages import qa
from .words import common_words, frequent_words

TAUGHT: dict[str, Builder] = {
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "variable_tracking": variable_tracking,
    "headings": headings,
    "common_words": common_words,
    "frequent_words": frequent_words,
}
"""Builders of the task kinds that the shipped model was trained on, by name.

Their texts must not change, since its figures depend on them.
"""

TASKS: dict[str, Builder] = {
    **TAUGHT,
    "single_noise": single_noise,
    "single_prose": single_prose,
    "single_needles": single_needles,
    "single_code": single_code,
    "multikey_few": multikey_few,
    "multikey_all": multikey_all,
    "multikey_codes": multikey_codes,
    "passkey": passkey,
    "number_string": number_string,
    "kv_retrieval": kv_retrieval,
    "extreme_number": extreme_number,
    "qa": qa,
}
"""Builders of all task kinds by name; `qa` needs the option `passages`."""

Measure = Callable[[str, Question], int]
"""(document, question) -> number of tokens of a whole sample."""

QUERY_START = "\n\n"
"""Separator between the document and the question."""

SHORTEST = 192
"""Shortest sample, in tokens; fewer leave no room for a task."""


@dataclass(frozen=True)
class Sample:
    """A document, a question about it and the answers; `length` is in tokens and includes room for the answer."""

    task: str
    document: str
    query: str
    answers: tuple[str, ...]
    seed: int
    length: int

    @property
    def answer(self) -> str:
        """The answers in the format that the shipped model was trained on."""
        return ", ".join(self.answers)


def size(text: str, tokenizer: Tokenizer) -> int:
    """Number of tokens of a text."""
    return len(tokenizer.encode(text, add_special_tokens=False)) if text else 0


def plain_size(tokenizer: Tokenizer, document: str, question: Question) -> int:
    """Number of tokens of BOS, if the tokenizer has it, a document, a question, its answers and EOS."""
    prefix = 0 if getattr(tokenizer, "bos_token_id", None) is None else 1
    answers = size(" " + ", ".join(question.answers), tokenizer)
    return prefix + size(document, tokenizer) + size(QUERY_START + question.text, tokenizer) + answers + 1


@lru_cache(maxsize=4)
def encoder_of(tokenizer: Any) -> Encoder:
    """The encoder of a tokenizer, kept with its cache of segments."""
    return Encoder(tokenizer)


def arrange(material: Material, rng: Random, room: int, encoder: Encoder) -> str:
    """The document built from a material, of at most `room` tokens by the encoder's count."""
    if material.body is not None:
        return "".join(material.body)
    filler = material.filler or "prose"
    sentences = FILLERS[filler](rng) if isinstance(filler, str) else filler(rng)
    return "".join(weave(material.facts, sentences, rng, room, encoder))


def generate(
    task: str, tokenizer: Tokenizer, length: int, seed: int, measure: Measure | None = None, **options: Any
) -> Sample:
    """Generate a sample of `length` tokens: prefix (BOS), document, query, and room for the answer and EOS.

    The sample never has more tokens than that, and at most about one percent fewer. It depends on the arguments alone.

    Args:
        task: a name in `TASKS`.
        tokenizer: anything with `encode(text, add_special_tokens=False)`.
        length: total number of tokens.
        seed: the same seed gives the same sample.
        measure: the number of tokens of a document (which may be empty) with a question and all that goes with them,
            if they are not read as above, as with a chat template.
        options: options of the task's builder, e.g. `distractor_needles`, `hops`, `haystack`.

    Raises:
        TaskError: an unknown task or haystack, or a length into which the task does not fit.
    """
    if task not in TASKS:
        raise TaskError(f"There is no task {task!r}: choose one of {', '.join(TASKS)}.")
    if length < SHORTEST:
        raise TaskError(f"A sample of {length} tokens is too short; ask for {SHORTEST} or more.")
    if options.get("haystack") not in (None, *FILLERS):
        raise TaskError(f"There is no haystack {options['haystack']!r}: choose one of {', '.join(FILLERS)}.")
    encoder = encoder_of(tokenizer)
    measure = measure or partial(plain_size, tokenizer)
    goal, made = length, None
    for _ in range(8):
        # Counts by segment are exact for word-level tokenizers; for others the goal is corrected by the true count.
        rng = Random(f"{task} {seed}")
        material = TASKS[task](rng, goal - 64, encoder, **options)
        question = material.questions[0]
        room = goal - measure("", question)
        if material.body is not None:
            rng = Random(f"{task} {seed}")
            material = TASKS[task](rng, room, encoder, **options)
            question = material.questions[0]
        document = arrange(material, rng, room, encoder)
        total = measure(document, question)
        if total <= length:
            made = Sample(task, document, question.text, question.answers, seed, total)
        if 0.988 * length <= total <= length:
            break
        goal = max(SHORTEST // 2, int(goal * (length - 2) / total) - (1 if total > length else 0))
    if made is None:
        raise TaskError(f"A sample of {length} tokens cannot be made: the shortest has {total}.")
    return made


def score(sample: Sample, prediction: str) -> float:
    """Share of the answers, from 0 to 100, that occur in the prediction as whole words, ignoring case."""
    text = prediction.lower()
    found = [re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text) is not None for answer in sample.answers]
    return 100.0 * sum(found) / len(found)
