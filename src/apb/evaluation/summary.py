"""Contents of a report, independent of its format: tables in the paper's layout, differences, and speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..planning.methods import METHODS
from .records import Record
from .statistics import Cell, Difference, baseline_of, cell, difference, grouped

# Full attention, which tables list first.
BASELINE = next(iter(METHODS))


@dataclass(frozen=True)
class Table:
    """Scores of one suite at one length: a row per reading, a column per task, then their mean.

    Attributes:
        suite, length: suite and nominal length of the samples.
        tasks: the columns.
        cells: reading -> task -> cell.
        baseline: the reading that the others are compared with.
        differences: reading -> difference over all tasks.
        by_task: reading -> task -> difference.
    """

    suite: str
    length: int
    tasks: list[str]
    cells: dict[str, dict[str, Cell]]
    baseline: str
    differences: dict[str, Difference] = field(default_factory=dict)
    by_task: dict[str, dict[str, Difference]] = field(default_factory=dict)

    def average(self, reading: str) -> float | None:
        """Mean score of a reading over all tasks; None if a task is missing, as means would not be comparable."""
        row = self.cells[reading]
        return sum(row[task].score for task in self.tasks) / len(self.tasks) if len(row) == len(self.tasks) else None


@dataclass(frozen=True)
class Speed:
    """Prefill speed of a reading in runs that had the machine to themselves: median prompt tokens per second."""

    suite: str
    length: int
    reading: str
    tokens_per_s: float
    samples: int


@dataclass(frozen=True)
class Summary:
    """The contents of a report."""

    models: list[str]
    devices: list[str]
    answers: int
    tables: list[Table]
    speeds: list[Speed]

    @property
    def readings(self) -> list[str]:
        """Names of all readings, full attention first."""
        return list(dict.fromkeys(reading for table in self.tables for reading in table.cells))


def summarize(records: Sequence[Record]) -> Summary:
    """Summarize the records of one or several runs; of duplicate records the first one counts.

    Times count only if the run had the machine to itself; scores always count.
    """
    unique = list({record.key: record for record in reversed(records)}.values())[::-1]
    # Full attention first, then strategy by strategy.
    unique.sort(key=lambda r: (r.strategy != BASELINE, r.strategy, r.blocks, r.reading_name))
    tables, speeds = [], []
    places = grouped(unique, lambda record: (record.suite, record.length))
    for (suite, length), part in sorted(places.items()):
        readings = grouped(part, lambda record: record.reading_name)
        table = Table(
            suite,
            length,
            list(dict.fromkeys(record.task for record in records if (record.suite, record.length) == (suite, length))),
            {name: _by_task(group) for name, group in readings.items()},
            baseline_of(readings),
        )
        for name, group in readings.items():
            _differ(table, name, group, readings[table.baseline])
        tables.append(table)
    alone = [record for record in records if record.processes == 1 and record.prefill_s > 0]
    for (suite, length, name), group in grouped(alone, lambda r: (r.suite, r.length, r.reading_name)).items():
        rates = sorted(record.prompt_tokens / record.prefill_s for record in group)
        speeds.append(Speed(suite, length, name, rates[len(rates) // 2], len(rates)))
    return Summary(
        sorted({f"{record.model}, {record.dtype}" for record in unique}),
        sorted({record.device for record in unique}),
        len(unique),
        tables,
        speeds,
    )


def _by_task(records: Sequence[Record]) -> dict[str, Cell]:
    return {task: cell(group) for task, group in grouped(records, lambda record: record.task).items()}


def _differ(table: Table, name: str, group: Sequence[Record], baseline: Sequence[Record]) -> None:
    whole = difference(group, baseline) if name != table.baseline else None
    if whole is None:
        return
    table.differences[name] = whole
    table.by_task[name] = {}
    for task, part in grouped(group, lambda record: record.task).items():
        found = difference(part, baseline)
        if found is not None:
            table.by_task[name][task] = found
