"""Contents of a report, independent of its format: tables in the paper's layout, differences, and speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .records import Record
from .statistics import BASELINE, Cell, Difference, baselines, cell, difference, grouped

Place = tuple[str, str, int]
"""Model with its dtype, suite, length."""


@dataclass(frozen=True)
class Comparison:
    """Differences of the other readings to one.

    Attributes:
        baseline: the reading that the others are compared with.
        whole: reading -> difference over all tasks.
        by_task: reading -> task -> difference.
    """

    baseline: str
    whole: dict[str, Difference]
    by_task: dict[str, dict[str, Difference]]


@dataclass(frozen=True)
class Table:
    """Scores of one model and suite at one length: a row per reading, a column per task, then their mean.

    Attributes:
        model, suite, length: the model with its dtype, the suite, and the nominal length of its samples.
        tasks: the columns.
        cells: reading -> task -> cell.
        comparisons: with each reading of full attention, the question in front or not.
    """

    model: str
    suite: str
    length: int
    tasks: list[str]
    cells: dict[str, dict[str, Cell]]
    comparisons: list[Comparison]

    @property
    def place(self) -> Place:
        """Model, suite and length."""
        return self.model, self.suite, self.length

    def average(self, reading: str) -> float | None:
        """Mean score of a reading over all tasks; None if a task is missing, as means would not be comparable."""
        row = self.cells[reading]
        return sum(row[task].score for task in self.tasks) / len(self.tasks) if len(row) == len(self.tasks) else None


@dataclass(frozen=True)
class Speed:
    """Prefill speed of a reading in runs that had the machine to themselves: medians over samples."""

    place: Place
    reading: str
    tokens_per_s: float
    seconds: float
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
    """Summarize the records of one or several runs; of duplicate records the first answer counts.

    Times count only if the run had the machine to itself; scores always count.
    """
    answered_first = sorted(records, key=lambda record: record.error is not None)
    unique = list({record.key: record for record in reversed(answered_first)}.values())[::-1]
    # Full attention first, then strategy by strategy.
    unique.sort(key=lambda r: (r.strategy != BASELINE, r.strategy, r.asked.get("blocks", 0), r.reading_name))
    tables, speeds = [], []
    for place, part in sorted(grouped(unique, _place).items()):
        readings = grouped(part, lambda record: record.reading_name)
        model, suite, length = place
        table = Table(
            model,
            suite,
            length,
            list(dict.fromkeys(record.task for record in records if _place(record) == place)),
            {name: _by_task(group) for name, group in readings.items()},
            [_comparison(readings, baseline) for baseline in baselines(readings)],
        )
        tables.append(table)
    alone = [record for record in records if record.processes == 1 and record.prefill_s > 0]
    for (place, name), group in grouped(alone, lambda record: (_place(record), record.reading_name)).items():
        rates = sorted(record.prompt_tokens / record.prefill_s for record in group)
        seconds = sorted(record.prefill_s for record in group)
        middle = len(group) // 2
        speeds.append(Speed(place, name, rates[middle], seconds[middle], len(group)))
    return Summary(
        sorted({_place(record)[0] for record in unique}),
        sorted({record.device for record in unique}),
        len(unique),
        tables,
        speeds,
    )


def _place(record: Record) -> Place:
    return f"{record.model}, {record.dtype}", record.suite, record.length


def _by_task(records: Sequence[Record]) -> dict[str, Cell]:
    return {task: cell(group) for task, group in grouped(records, lambda record: record.task).items()}


def _comparison(readings: Mapping[str, Sequence[Record]], baseline: str) -> Comparison:
    found = Comparison(baseline, {}, {})
    for name, group in readings.items():
        whole = difference(group, readings[baseline]) if name != baseline else None
        if whole is not None:
            tasks = grouped(group, lambda record: record.task)
            one = {task: difference(part, readings[baseline]) for task, part in tasks.items()}
            found.whole[name] = whole
            found.by_task[name] = {task: each for task, each in one.items() if each is not None}
    return found
