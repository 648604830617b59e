"""Samples answered by many processes that share the GPUs, in units that an interrupted run resumes after."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engines

from apb.evaluation.settings import Setting

if TYPE_CHECKING:
    from apb.evaluation.records import Record


@dataclass(frozen=True)
class Unit:
    """Some samples of one task and length, and the settings that read them."""

    task: str
    length: int
    settings: tuple[Setting, ...]
    seed: int
    first: int
    count: int


def answer(unit: Unit, processes: int, batch_size: int = 1) -> list[Record]:
    """The records of a unit; ``processes`` and ``batch_size`` as of :class:`apb.evaluation.runner.Runner`."""
    from apb.evaluation.items import Skipped
    from apb.evaluation.records import Store, model_name
    from apb.evaluation.runner import Runner
    from apb.evaluation.synthetic import items

    engine = engines.engine()
    name = model_name(engine.model, str(engine.model.name_or_path))
    runner = Runner(engine, name, unit.settings, Store(), processes, batch_size)
    skipped = Skipped()
    drawn = items(runner.tokenizer, unit.task, unit.length, unit.count, unit.seed, first=unit.first, skipped=skipped)
    found = [record for row in runner.run(drawn) for record in row]
    for reason in skipped.reasons:
        print(reason, flush=True)
    return found


def asked(setting: Setting) -> str:
    """A setting as text, the same as :func:`asked_of` gives for its records."""
    return f"{sorted(setting.asked.items())} {Path(setting.heads).name if setting.heads else None}"


def asked_of(record: Record) -> str:
    """The setting of a record as text."""
    return f"{sorted(record.asked.items())} {record.heads.split()[0] if record.heads else None}"


def remaining(units: Iterable[Unit], records: Iterable[Record]) -> list[Unit]:
    """The units without those settings that have answered all their samples."""
    known = {
        (record.task, record.length, record.sample, asked_of(record)) for record in records if record.error is None
    }
    found = []
    for unit in units:
        first = unit.seed * 1_000_000 + unit.first
        names = [str(number) for number in range(first, first + unit.count)]
        wanted = [s for s in unit.settings if any((unit.task, unit.length, n, asked(s)) not in known for n in names)]
        if wanted:
            found.append(replace(unit, settings=tuple(wanted)))
    return found


def run(
    model: str,
    missing: list[Unit],
    jobs: int,
    until: float,
    keep: Callable[[Record], Any],
    quantization: str | None = None,
    batch_size: int = 1,
) -> int:
    """Answer units in ``jobs`` processes, and start none after ``until`` (of ``time.perf_counter``).

    Returns:
        The number of units that are left.
    """
    missing, began = list(missing), time.perf_counter()
    with engines.pool(model, jobs, quantization=quantization) as pool:
        running: dict[Future[list[Record]], Unit] = {}
        while missing or running:
            while missing and len(running) < 2 * jobs and time.perf_counter() < until:
                unit = missing.pop(0)
                running[pool.submit(partial(answer, unit, jobs, batch_size))] = unit
            if time.perf_counter() >= until:  # what waits in the pool is left as well
                missing = [running.pop(future) for future in list(running) if future.cancel()] + missing
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                for record in future.result():
                    keep(record)
                print(f"{time.perf_counter() - began:.0f} s {unit.task} {unit.length}, {len(missing)} left", flush=True)
    return len(missing)
