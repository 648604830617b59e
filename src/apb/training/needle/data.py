"""Training data of the small model: generated contexts with many questions each, made by worker processes."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from random import Random
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...evaluation.tasks import FILLERS, TAUGHT, TaskError
from ...evaluation.tasks.chains import chains
from ...evaluation.tasks.chapters import chapters
from ...evaluation.tasks.material import Encoder, Fact, Material, Question, Tokenizer, number, pick, weave
from ...evaluation.tasks.needles import STATEMENTS, ask_all, ask_list, ask_one, draw_keys, statement

LENGTHS = tuple(272 * 2**step for step in range(8))
"""Lengths of the curriculum: each divides BATCH, so that every step has the same number of tokens."""
BATCH = 4 * LENGTHS[-1]
SELECTED = 32_768
"""Positions of a step at which the loss is taken: all answers, and a draw of the rest."""
LONELY = 4.0
"""Weight of the answer of a context with one question: such contexts are few, and what evaluation asks."""
KINDS = (*TAUGHT, "reminder")
REMINDER = " This page still belongs to chapter"


@dataclass
class Row:
    """Token ids of one context with its questions and answers; spans are (first, end, kind) of answer tokens."""

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)


class NeedleEncoder(Encoder):
    """An encoder that knows that numbers are cut into groups of three, so that six digits need no tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.space = tokenizer.encode(" ", add_special_tokens=False)
        self.groups = {f"{n:03}": tokenizer.encode(f"{n:03}", add_special_tokens=False) for n in range(1000)}

    def ids(self, segment: str) -> list[int]:
        """Token ids of one segment."""
        found = self.cache.get(segment)
        if found is not None:
            return found
        if len(segment) == 7 and segment[0] == " " and segment[1:].isdigit():
            return self.space + self.groups[segment[1:4]] + self.groups[segment[4:]]
        return super().ids(segment)


def between(rng: Random, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(rng.random() * (max(low, high) - low + 1))


def question_range(room: int) -> tuple[int, int]:
    """Fewest and most questions of a context: a long one has more, so that a step of few contexts has many."""
    steps = ((500, (4, 20)), (8000, (1, 32)), (16_000, (8, 48)))
    return next((span for limit, span in steps if room < limit), (24, 56))


def needles(rng: Random, room: int) -> Material:
    """Needles of one or several values, and questions for one, for all values of a key, and for several keys."""
    material = Material()
    forms = STATEMENTS if rng.random() < 0.5 else (pick(rng, STATEMENTS),)
    keys = draw_keys(rng, 160)
    wanted = between(rng, *(question_range(room) if rng.random() < 0.85 else (1, 4)))
    asked, told = 0.45 * room, 0.45 * room
    simple = (0.3 if room > 1000 else 0.5) if room > 500 else 0.7
    while len(material.questions) < wanted and asked > 18 and told > 16 and len(keys) > 10:
        sort = rng.random()
        count = 1 if sort < simple else between(rng, 2, 5 if room > 500 else 3)
        if count > 1 and (asked < 40 or told < 80):
            continue
        values = tuple(number(rng) for _ in range(count))
        if len(set(values)) < count:
            continue
        if simple <= sort < (1 + simple) / 2:
            key = keys.pop()
            places = sorted(rng.random() for _ in values)
            owners = [key] * count
            material.questions.append(ask_all(rng, key, values))
        else:
            owners = [keys.pop() for _ in values]
            places = [rng.random() for _ in values]
            question = ask_one(rng, owners[0], values[0], "multikey") if count == 1 else ask_list(rng, owners, values)
            material.questions.append(question)
        for place, owner, value in zip(places, owners, values, strict=True):
            material.facts.append(Fact(place, statement(rng, owner, value, forms)))
        asked -= 10 + 8 * count
        told -= 15 * count
    spare = min(len(keys), int(told / 16)) if rng.random() < 0.8 else 0
    for key in keys[: between(rng, 0, spare)]:
        material.facts.append(Fact(rng.random(), statement(rng, key, number(rng), forms)))
    return material


def variables(rng: Random, room: int) -> Material:
    """Chains of variables, most of them asked for."""
    share = 0.9 * room / 70
    most = min(12 if room < 8000 else 24, int(share))
    return chains(rng, [between(rng, 2, 6) for _ in range(between(rng, (most + 2) // 3, most))])


def headed(rng: Random, room: int) -> Material:
    """Chapters with notes, most of them asked for; in some texts a reminder tells which chapter it still is."""
    most = min(40 if room < 8000 else 56, int(room / 40))
    material = chapters(rng, between(rng, 2, 8 if room > 400 else 4), between(rng, (most + 2) // 3, most))
    material.questions = material.questions[: between(rng, len(material.questions) // 2, 48)]
    if rng.random() < 0.35:
        marks = [(fact.place, fact.segments[1]) for fact in material.facts if fact.segments[0] == "\n\nChapter"]
        for _ in range(between(rng, 1, 4)):
            place = rng.random()
            title = [title for start, title in marks if start < place][-1]
            material.facts.append(Fact(place, [REMINDER, title, "."]))
    return material


def mixed(rng: Random, room: int) -> Material:
    """Needles, chains and chapters in one text."""
    parts = [needles(rng, room // 3), variables(rng, room // 3), headed(rng, room // 3)]
    questions = [question for part in parts for question in part.questions]
    return Material([fact for part in parts for fact in part.facts], questions)


RETRIEVAL = ("single", "multikey", "multivalue", "multiquery")


def compose(rng: Random, length: int, encoder: Encoder, hard: bool) -> Material:
    """The material of one context: usually many questions, in some as an evaluation asks: one."""
    draw = rng.random()
    room = length - 48
    if draw < 0.15:
        task = pick(rng, (*RETRIEVAL, "variable_tracking", "headings") if hard and length > 500 else RETRIEVAL)
        return TAUGHT[task](rng, room, encoder)
    if not hard:
        return needles(rng, room)
    if draw < 0.20 and length > 1000:
        task = pick(rng, ("common_words", "frequent_words"))
        return TAUGHT[task](rng, room, encoder)
    return pick(rng, (needles,) * 8 + (variables,) * 3 + (headed,) * 6 + (mixed,) * 3)(rng, room)


def question_ids(question: Question, encoder: Encoder) -> list[int]:
    """Token ids of a question with the line breaks before it."""
    first, *rest = question.segments
    ids = list(encoder.ids("\n\n" + first.lstrip()))
    for segment in rest:
        ids += encoder.ids(segment)
    return ids


def answer_ids(question: Question, encoder: Encoder, eos: int) -> list[int]:
    """Token ids of the answers, joined by a comma and a space, and the end."""
    ids: list[int] = []
    for index, answer in enumerate(question.answers):
        ids += (encoder.ids(",") if index else []) + encoder.ids(" " + answer)
    return [*ids, eos]


def assemble(material: Material, rng: Random, length: int, encoder: Encoder, bos: int, eos: int) -> Row:
    """BOS, in half of the rows the first question, the document, then questions with answers: at most `length`."""
    questions = material.questions
    rng.shuffle(questions)
    asked = [(question_ids(q, encoder), answer_ids(q, encoder, eos), KINDS.index(q.task)) for q in questions]
    row = Row([bos])
    if rng.random() < 0.5:
        row.ids += asked[0][0]
    room = length - len(row.ids) - sum(len(question) + len(answer) for question, answer, _ in asked) - 3
    if material.body is not None:
        segments = material.body
        if encoder.count(segments) > room:
            raise TaskError("the list is too long")
    else:
        name = material.filler or pick(rng, ("prose", "prose", "soup", "noise"))
        assert isinstance(name, str), "only kinds that are not taught bring fillers of their own"
        filler = FILLERS[name](rng)
        segments = weave(material.facts, filler, rng, room, encoder)
    ids, cache = row.ids, encoder.cache
    reminded = REMINDER in segments
    for index, segment in enumerate(segments):
        found = cache.get(segment) or encoder.ids(segment)
        if reminded and index and segments[index - 1] == REMINDER:
            row.spans.append((len(ids), len(ids) + len(found), KINDS.index("reminder")))
        ids += found
    for question, answer, kind in asked:
        ids += question
        row.spans.append((len(ids), len(ids) + len(answer), kind))
        ids += answer
    if len(ids) > length:
        raise TaskError("the row is too long")
    return row


def make_row(rng: Random, length: int, encoder: Encoder, bos: int, eos: int, hard: bool) -> Row:
    """One context of at most `length` tokens."""
    for _ in range(1000):
        try:
            return assemble(compose(rng, length, encoder, hard), rng, length, encoder, bos, eos)
        except TaskError:  # the draw was too large for this length: draw again
            continue
    raise TaskError(f"no context of {length} tokens could be made")


def make_batch(
    rng: Random,
    length: int,
    encoder: Encoder,
    bos: int,
    eos: int,
    hard: bool,
    tokens: int = BATCH,
    selected: int = SELECTED,
) -> dict[str, Any]:
    """`tokens` tokens of contexts, where the loss is taken, which answer each place belongs to, the answers' kinds."""
    flat = numpy.full(tokens, eos, dtype=numpy.int16)
    free = numpy.zeros(tokens, dtype=bool)
    places: list[int] = []
    spans: list[int] = []
    kinds: list[int] = []
    weights: list[float] = []
    for start in range(0, tokens, length):
        row = make_row(rng, length, encoder, bos, eos, hard)
        flat[start : start + len(row.ids)] = row.ids
        free[start : start + len(row.ids) - 1] = True
        for first, end, kind in row.spans:
            if len(places) + end - first > selected * 3 // 4:
                break
            kinds.append(kind)
            places += range(start + first - 1, start + end - 1)
            spans += [len(kinds)] * (end - first)
            weights += [LONELY if len(row.spans) == 1 else 1.0] * (end - first)
    free[places] = False
    rest = numpy.flatnonzero(free)
    chosen = numpy.random.default_rng(between(rng, 0, 2**31)).choice(rest, selected - len(places), replace=False)
    return {
        "length": length,
        "tokens": torch.from_numpy(flat),
        "places": torch.tensor(places + chosen.tolist(), dtype=torch.int32),
        "spans": torch.tensor(spans + [0] * len(chosen), dtype=torch.int32),
        "kinds": torch.tensor(kinds, dtype=torch.int64),
        "weights": torch.tensor(weights + [0.0] * len(chosen), dtype=torch.float32),
    }


class Batches(IterableDataset):
    """Endless batches; the trainer sets `stage` (index of the longest length) and `hard` (all kinds) from outside."""

    def __init__(self, tokenizer: Tokenizer, seed: int, stage: Synchronized, hard: Synchronized, **sizes: int) -> None:
        self.tokenizer, self.seed, self.stage, self.hard, self.sizes = tokenizer, seed, stage, hard, sizes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker = info.id if info else 0
        torch.set_num_threads(1)
        encoder = NeedleEncoder(self.tokenizer)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id  # type: ignore[attr-defined]
        count = 0
        while True:
            rng = Random(f"training {self.seed} {worker} {count}")
            count += 1
            stage = self.stage.value
            # A quarter of the steps stays at one of the three lengths below the current one.
            index = stage if stage == 0 or rng.random() < 0.75 else max(0, stage - between(rng, 1, 3))
            try:
                yield make_batch(rng, LENGTHS[index], encoder, bos, eos, bool(self.hard.value), **self.sizes)
            except Exception:
                traceback.print_exc()
                raise


def loader(batches: Batches, workers: int, pin: bool) -> DataLoader:
    """A loader with so many worker processes (none: in this process)."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=3 if workers else None,
        pin_memory=pin,
        multiprocessing_context="fork" if workers else None,
    )
