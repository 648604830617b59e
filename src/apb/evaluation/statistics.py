"""Means with their uncertainty: intervals of a score, and of the paired difference of two readings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy

from ..planning.methods import METHODS
from .records import Record

# Two-sided 95 % of the normal distribution.
_Z = 1.959964
RESAMPLES = 10_000
BASELINE = next(iter(METHODS))
"""Full attention, which other strategies are compared with and tables list first."""


def interval(mean: float, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean score, 0 to 100.

    It is meant for scores of either 0 or 100, and conservative for scores in between, which vary less. Unlike a
    bootstrap interval it has a width even if all scores are equal.
    """
    share = mean / 100
    denominator = 1 + _Z**2 / samples
    middle = (share + _Z**2 / (2 * samples)) / denominator
    half = _Z / denominator * math.sqrt(share * (1 - share) / samples + _Z**2 / (4 * samples**2))
    # The mean lies inside the interval, also after rounding.
    return min(mean, max(0.0, 100 * (middle - half))), max(mean, 100 * (middle + half))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean; resampling uses a fixed seed."""
    return _middle(_resampled(values, numpy.random.default_rng(0)))


def _resampled(values: Sequence[float], rng: numpy.random.Generator) -> numpy.typing.NDArray[numpy.float64]:
    """Means (RESAMPLES,) of as many values, drawn with replacement."""
    return numpy.array(values)[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)


def _middle(means: numpy.typing.NDArray[numpy.float64]) -> tuple[float, float]:
    """The bounds of the middle 95 %."""
    low, high = numpy.percentile(means, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Cell:
    """One cell of the table: the mean score, 0 to 100, of one task, length and reading.

    The plan's numbers are those of the first sample, ``prefill_s`` is the mean of the samples answered. Samples without
    an answer, because of an error, are among the ``samples`` with a score of 0; ``failed`` counts them. ``decode`` is
    the decode method and ``share`` the mean share of the keys that tokens attended to, None if the records do not say.
    """

    suite: str
    task: str
    length: int
    model: str
    strategy: str
    compressor: str | None
    heads: str | None
    blocks: int
    anchor_length: int
    passing_length: int
    ranks: int
    question_first: bool
    samples: int
    failed: int
    score: float
    interval: tuple[float, float]
    prefill_s: float
    decode: str | None
    share: float | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)


def cell(records: Sequence[Record]) -> Cell:
    """The cell of records of one task, length and reading."""
    answered, count = [record for record in records if record.error is None], len(records)
    first = (answered or records)[0]
    shares = [record.decode["share"] for record in records if record.decode is not None]
    mean = sum(record.score for record in records) / count
    return Cell(
        first.suite,
        first.task,
        first.length,
        first.model,
        first.strategy,
        first.compressor,
        first.heads,
        first.blocks,
        first.anchor_length,
        first.passing_length,
        first.ranks,
        bool(first.asked.get("question_first")),
        count,
        count - len(answered),
        mean,
        interval(mean, count),
        sum(record.prefill_s for record in answered) / max(1, len(answered)),
        None if first.decode is None else first.decode["method"],
        sum(shares) / len(shares) if shares else None,
    )


@dataclass(frozen=True)
class Difference:
    """Paired difference to a baseline on the same samples: the mean of the tasks' mean differences.

    Attributes:
        tasks, samples: number of tasks, and of samples answered by both readings.
        difference: in points, on the scale of 0 to 100.
        interval: 95 % interval from a bootstrap over samples within each task.
        differing: number of samples with different scores. At 0 the bootstrap interval has no width; then at most
            ``100 (1 - 0.05^(1 / samples))`` percent of all samples differ, with 95 % confidence.
    """

    tasks: int
    samples: int
    difference: float
    interval: tuple[float, float]
    differing: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)


def difference(records: Iterable[Record], baseline: Iterable[Record]) -> Difference | None:
    """Paired difference of records to a baseline's records; None if they have no sample in common.

    Resampling uses a fixed seed, so the same records give the same interval.
    """
    known = {_sample(record): record.score for record in baseline}
    tasks: dict[str, list[float]] = {}
    for record in records:
        if _sample(record) in known:
            tasks.setdefault(record.task, []).append(record.score - known[_sample(record)])
    if not tasks:
        return None
    rng = numpy.random.default_rng(0)
    means = numpy.zeros(RESAMPLES)
    for _, values in sorted(tasks.items()):
        means += _resampled(values, rng) / len(tasks)
    flat = [value for values in tasks.values() for value in values]
    average = sum(sum(values) / len(values) for values in tasks.values()) / len(tasks)
    return Difference(len(tasks), len(flat), average, _middle(means), sum(value != 0 for value in flat))


def _sample(record: Record) -> tuple[Any, ...]:
    return (record.model, record.dtype, record.suite, record.task, record.length, record.sample, record.prompt)


def grouped(records: Iterable[Record], by: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records grouped by ``by``, with groups in order of first appearance."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(by(record), []).append(record)
    return groups


def baselines(readings: Mapping[str, Sequence[Record]]) -> list[str]:
    """Names of the readings that the others are compared with: full attention, the question in front or not.

    If there is neither, the first one.
    """
    found = [name for name, group in readings.items() if group[0].strategy == BASELINE and _is_plain(group[0])]
    return found or list(readings)[:1]


def _is_plain(record: Record) -> bool:
    return record.ranks == 1 and not set(record.asked) - {"strategy", "question_first", "max_new_tokens"}


def compare(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Differences to each baseline (:func:`baselines`) per suite, length and reading.

    Each is a :class:`Difference` as plain values, plus ``suite``, ``length``, ``reading`` and ``baseline``.
    """
    rows = []
    for (suite, length), part in grouped(records, lambda record: (record.suite, record.length)).items():
        readings = grouped(part, lambda record: record.reading_name)
        for baseline, (name, group) in product(baselines(readings), readings.items()):
            found = difference(group, readings[baseline]) if name != baseline else None
            if found is not None:
                where = {"suite": suite, "length": length, "reading": name, "baseline": baseline}
                rows.append(where | found.to_dict())
    return rows
