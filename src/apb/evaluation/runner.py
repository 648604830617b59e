"""Evaluation loop: every setting answers a sample before the next sample is read; answers are stored as records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch

from ..asking import NEUTRAL, TYPICAL, OfTokens
from ..document import Document
from ..engine import Engine
from ..errors import InputError, NotFinite, at_least, unexpected
from ..generation import Generation, Sampling
from ..hardware import device_name
from ..hf.sampling import ends_turn
from ..prompt import Prompt
from ..session import Session
from ..state import State
from .items import Item, prompt_hash
from .records import Record, Store, file_name
from .scoring import METRICS
from .settings import Setting

# Called with (answers so far, answers in all).
Progress = Callable[[int, int], None]


@dataclass
class Runner:
    """Answers items with one model in several ways. Under several ranks all make the same calls.

    Attributes:
        engine: gives model, tokenizer and ranks; its own strategy is not used.
        model: the model's name in records.
        settings: the readings to compare.
        store: the store of records, including those of an earlier run.
        processes: number of runs that share the machine, for the records.
        batch_size: most answers that are written side by side, after their prompts were read one after the other: fewer
            where their caches do not fit into memory. A captured step has as many rows, whether or not all are in use,
            so there an answer does not depend on those beside it. Answers from a reading that is shared, or of a
            document that was read before, are written alone. What an interrupted run had read but not answered is
            read again.
        budget: the longest answer, in tokens, if the user chose it and not the suite: then it is part of the reading.
        cuts: tokens that documents lost to fit their limits, one number for each that lost any.
    """

    engine: Engine
    model: str
    settings: Sequence[Setting]
    store: Store
    processes: int = 1
    batch_size: int = 1
    budget: int | None = None
    cuts: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.engine.tokenizer is None:
            raise InputError("Evaluation needs a tokenizer; give one to Engine.from_model.")
        at_least("batch size", self.batch_size, 1)
        self.tokenizer = self.engine.tokenizer
        self._heads = cache(file_name)
        self._ends = ends_turn(self.engine.model, self.tokenizer)

    def run(self, items: Iterable[Item], done: Callable[[], None] | None = None) -> Iterator[list[Record]]:
        """Yield every item's records in the order of the settings on rank 0, and empty lists on the others.

        Args:
            items: the items to answer; an iterator is consumed one at a time.
            done: called after every answer, or before those that are written together with later ones.
        """
        with ExitStack() as open_engines:
            engines = [open_engines.enter_context(closing(setting.engine(self.engine))) for setting in self.settings]
            rows: list[list[Record | _Unwritten]] = []
            for item in items:
                prompt = self._prompt(item)
                rows.append([])
                for _, beside in groupby(zip(self.settings, engines, strict=True), lambda each: each[0].reading):
                    shared = list(beside)
                    read = self._reading(item, prompt, shared)
                    for setting, engine in shared:
                        rows[-1].append(self._begun(item, prompt, setting, engine, read, rows))
                        if len(_unwritten(rows)) == self.batch_size:
                            self._write(rows)
                        if done is not None:
                            done()
                while rows and not _unwritten(rows[:1]):
                    yield self._kept(rows.pop(0))
            self._write(rows)
            yield from map(self._kept, rows)

    def _kept(self, row: list[Record | _Unwritten]) -> list[Record]:
        """The records of an item whose answers are all there; none on ranks other than 0."""
        return [] if self.engine.group.rank else [each for each in row if isinstance(each, Record)]

    def _prompt(self, item: Item) -> Prompt | InputError:
        first = any(setting.method.question_first for setting in self.settings)
        try:
            prompt, cut = item.fitted(self.tokenizer, first)
        except InputError as error:
            return error
        self.cuts += [cut] if cut else []
        return prompt

    def _reading(
        self, item: Item, prompt: Prompt | InputError, shared: Sequence[tuple[Setting, Engine]]
    ) -> Callable[[], Document] | None:
        """What reads the document once for settings that differ in the decode method alone, when it is first needed.

        None if question and document are to be read at once.
        """
        setting, engine = shared[0]
        if isinstance(prompt, InputError) or (setting.ask_after is None and len(shared) == 1):
            return None
        return cache(lambda: self._read(item, prompt, setting.ask_after or "this", engine))

    def _read(self, item: Item, prompt: Prompt, ask_after: str, engine: Engine) -> Document:
        """The document of a prompt, read for one of :data:`ASK_AFTER`, without the question's rows."""
        queries = {"this": item.query, "other": item.other_query, "none": NEUTRAL, "typical": TYPICAL}
        query = queries[ask_after]
        asked = replace(item, query=query, limit=None).prompt(self.tokenizer)
        read = replace(prompt, query=asked.query, front=asked.front, asked=ask_after != "none")
        session = engine.prefill(read)
        state = State.of_session(session, engine.reading.arranged(read), (), engine.reading.compressor.name)
        return Document(engine, OfTokens(prompt.prefix, prompt.document), state)

    def _begun(
        self,
        item: Item,
        prompt: Prompt | InputError,
        setting: Setting,
        engine: Engine,
        read: Callable[[], Document] | None,
        rows: list[list[Record | _Unwritten]],
    ) -> Record | _Unwritten:
        """The record of an answer (or of the lack of a prompt), from the store or new, or what is left to do for it.

        ``read``: see :meth:`_reading`. What it took counts for every setting that shares it. ``rows``: see
        :meth:`_write`, which is called if this prompt does not fit into memory beside theirs.
        """
        blank = self._blank(item, setting, engine)
        try:
            if isinstance(prompt, InputError):
                raise prompt
            blank = replace(blank, prompt=prompt_hash(prompt), prompt_tokens=len(engine.reading.arranged(prompt)))
            plan = engine.plan(replace(prompt, asked=setting.ask_after != "none"), item.max_new_tokens)
        except InputError as error:
            return self._stored(replace(blank, error=str(error)))
        blank = replace(
            blank,
            compressor=setting.compressor.name if setting.compressor and plan.passing_length else None,
            blocks=plan.blocks,
            anchor_length=plan.anchor_length,
            passing_length=plan.passing_length,
            exact=plan.exact and setting.decoding.exact,
        )
        known = self.store.get(blank.key)
        # Only rank 0 has the file, and all ranks must take the same branch.
        told = torch.tensor([known is not None], dtype=torch.long, device=engine.device)
        if engine.group.broadcast(told).item():
            return known or blank
        peak, held, room = engine.demand(plan, item.max_new_tokens)
        if sum(each.held for each in _unwritten(rows)) + peak > room:
            self._write(rows)
        while True:
            try:
                if read is None:
                    return self._prefilled(blank, item, prompt, engine, held)
                return self._stored(self._asked(blank, item, prompt, engine, read))
            except (InputError, NotFinite) as error:  # raised on all ranks
                return self._stored(replace(blank, error=str(error)))
            except torch.OutOfMemoryError as error:
                if engine.mesh.everyone.size > 1:
                    raise
                if not _unwritten(rows):
                    return self._stored(replace(blank, error=unexpected(error)))
            self._write(rows)  # which frees their memory

    def _prefilled(self, blank: Record, item: Item, prompt: Prompt, engine: Engine, held: int) -> _Unwritten:
        """A prompt that has been read at once with its question; ``held``: bytes of its cache."""
        start = time.perf_counter()
        session = engine.prefill(prompt, max_new_tokens=item.max_new_tokens)
        session.check_finite()  # now, as the next prompt's layers are looked at anew
        sampling = Sampling(**self._sampling(item))
        return _Unwritten(blank, item.metric, session, sampling, time.perf_counter() - start, held)

    def _asked(self, blank: Record, item: Item, prompt: Prompt, engine: Engine, read: Callable[[], Document]) -> Record:
        """The record of an answer from a document that is read without its question, now or for another setting."""
        state = read().state
        start = time.perf_counter()
        document = Document(engine, OfTokens(prompt.prefix, prompt.document), state)
        result = document.ask(prompt.query, **self._sampling(item))
        result.timing["prefill_s"] += state.prefill_s
        return _answered(blank, item.metric, result, state.prefill_s + time.perf_counter() - start)

    def _sampling(self, item: Item) -> dict[str, Any]:
        return {"max_new_tokens": item.max_new_tokens, "stopping_criteria": self._ends}

    def _write(self, rows: list[list[Record | _Unwritten]]) -> None:
        """Write the answers that are left to write in items' rows, all together, and put their records in place."""
        unwritten = _unwritten(rows)
        start = time.perf_counter()
        pairs = [(each.session, each.sampling) for each in unwritten]
        results = self.engine.answering.together(pairs, self.batch_size)
        seconds, processes = time.perf_counter() - start, self.processes * len(unwritten)
        written = (each.record(result, seconds, processes) for each, result in zip(unwritten, results, strict=True))
        for row in rows:
            row[:] = [self._stored(next(written)) if isinstance(each, _Unwritten) else each for each in row]

    def _stored(self, record: Record) -> Record:
        if self.engine.group.rank == 0:
            self.store.add(record)
        return record

    def _blank(self, item: Item, setting: Setting, engine: Engine) -> Record:
        """The record of an item that is to be answered."""
        chosen = {} if self.budget is None else {"max_new_tokens": self.budget}
        return Record(
            suite=item.suite,
            task=item.task,
            length=item.length,
            sample=item.sample,
            prompt="",
            prompt_tokens=0,
            model=self.model,
            asked=setting.asked | chosen,
            strategy=setting.strategy,
            compressor=None,
            heads=self._heads(setting.heads),
            blocks=0,
            anchor_length=0,
            passing_length=0,
            ranks=engine.group.size,
            exact=False,
            device=device_name(engine.device),
            dtype=str(engine.dtype).removeprefix("torch."),
            processes=self.processes,
            prediction="",
            answers=item.answers,
            score=0.0,
            seconds=0.0,
            prefill_s=0.0,
        )


@dataclass(frozen=True)
class _Unwritten:
    """A prompt that has been read, and whose answer is to be written.

    Attributes:
        blank: the record without the answer.
        metric: by which it is scored.
        session, sampling: of the answer.
        seconds: that reading took.
        held: bytes of the cache on a rank.
    """

    blank: Record
    metric: str
    session: Session
    sampling: Sampling
    seconds: float
    held: int

    def record(self, result: Generation | Exception, seconds: float, processes: int) -> Record:
        """The record, of an answer that took these seconds to write, one of so many at a time; or of an error."""
        blank = replace(self.blank, processes=processes)
        if isinstance(result, Exception):
            foreseen = isinstance(result, (InputError, NotFinite))
            return replace(blank, error=str(result) if foreseen else unexpected(result))
        return _answered(blank, self.metric, result, self.seconds + seconds)


def _unwritten(rows: Iterable[Iterable[Record | _Unwritten]]) -> list[_Unwritten]:
    """The answers that are left to write in items' rows."""
    return [each for row in rows for each in row if isinstance(each, _Unwritten)]


def _answered(blank: Record, metric: str, result: Generation, seconds: float) -> Record:
    return replace(
        blank,
        prediction=result.text,
        score=METRICS[metric](result.text, blank.answers),
        seconds=round(seconds, 6),
        prefill_s=round(result.timing["prefill_s"], 6),
        exact=result.exact,
        decode=result.decode,
    )
