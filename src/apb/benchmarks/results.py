"""Combining result files of ``apb bench prefill`` and ``decode``: one point per reading and length."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..planning.methods import METHODS

# Fields of a row that the tables need; a file without them is no result file.
PREFILL = set("strategy length plan backend seconds floor_seconds predicted_seconds peak_bytes parts note".split())
DECODE = set("length graph seconds tokens_per_s limit_seconds of_limit peak_bytes".split())


@dataclass(frozen=True)
class Point:
    """One reading at one length.

    Attributes:
        name: the strategy, with what distinguishes it from other readings by the same strategy.
        length: tokens of the prompt.
        seconds: seconds of a prefill; None if there are none, with the reason in ``note``.
        layers: number of layers run.
        scale: factor that scales the seconds of those layers up to all layers; 1 if all were run.
        row: the row of the file; its seconds are not scaled.
    """

    name: str
    length: int
    seconds: float | None
    layers: int
    scale: float
    row: dict[str, Any]

    @property
    def note(self) -> str | None:
        """Reason for missing figures; None if there are figures."""
        return None if self.seconds is not None else self.row["note"] or "stopped before it was measured"


@dataclass(frozen=True)
class Results:
    """The combined contents of result files.

    Attributes:
        model: name of the model.
        runs: (file name, its report) in the order given.
        prefill: one point per name and length, the last one given.
        decode: (ranks, row) in the order given.
    """

    model: str
    runs: list[tuple[str, dict[str, Any]]]
    prefill: list[Point]
    decode: list[tuple[int, dict[str, Any]]]

    @property
    def names(self) -> list[str]:
        """Names of the readings, in order of first appearance."""
        return list(dict.fromkeys(point.name for point in self.prefill))

    @property
    def lengths(self) -> list[int]:
        """Lengths of prefills, ascending."""
        return sorted({point.length for point in self.prefill})

    def point(self, name: str, length: int) -> Point | None:
        """The point of a reading at a length; None if there is none."""
        return next((point for point in self.prefill if (point.name, point.length) == (name, length)), None)

    def baseline(self, length: int) -> float | None:
        """Seconds of full attention on one device at a length; None if it was not measured."""
        found = (p.seconds for p in self.prefill if (p.row["strategy"], p.length) == (BASELINE, length))
        return next((seconds for seconds in found if seconds), None)


def sessions_of(row: dict[str, Any]) -> str:
    """How many sessions a row of decode is of, and how their tokens were read."""
    count = row.get("sessions", 1)  # older files have one
    return str(count) if count == 1 else f"{count} in {'one pass' if row['together'] else 'turns'}"


def read_results(paths: Iterable[Path]) -> Results:
    """Read and combine result files of one model.

    Raises:
        InputError: a file cannot be read, is no result file, or is of another model.
    """
    return combine([(path.name, _read(path)) for path in paths])


def combine(runs: list[tuple[str, dict[str, Any]]]) -> Results:
    """Combine reports of one model, given as (file name, report); InputError for several models."""
    models = list(dict.fromkeys(report["model"] for _, report in runs))
    if len(models) > 1:
        raise InputError(f"These results are of several models, {' and '.join(models)}; report each by itself.")
    whole = max(report["layers"] for _, report in runs)
    prefill = [(report, row) for _, report in runs for row in report["rows"] if "strategy" in row]
    several_ranks = len({report["ranks"] for report, row in prefill if _uses_ranks(row["strategy"])}) > 1
    at: dict[tuple[str, int, int], set[int]] = {}
    for report, row in prefill:
        at.setdefault((row["strategy"], row["length"], report["ranks"]), set()).add(row["plan"].get("blocks"))
    in_several_ways = {strategy for (strategy, _, _), blocks in at.items() if len(blocks) > 1}
    points: dict[tuple[str, int], Point] = {}
    for report, row in prefill:
        name, layers = row["strategy"], report["layers"]
        if name in in_several_ways and row["plan"]:
            name += f", {row['plan']['blocks']} blocks"
        if propagated := row.get("propagation"):
            name += f", {propagated['share']:.0%} above layer {propagated['layer']}"
        if several_ranks and _uses_ranks(row["strategy"]):
            name += f", {report['ranks']} ranks"
        if layers < whole:
            name += f", {layers} of {whole} layers scaled up"
        scale = whole / layers
        seconds = None if row["seconds"] is None else row["seconds"] * scale
        points[name, row["length"]] = Point(name, row["length"], seconds, layers, scale, row)
    decode = [(report["ranks"], row) for _, report in runs for row in report["rows"] if "graph" in row]
    return Results(models[0], runs, list(points.values()), decode)


# Full attention, what speed-ups are against.
BASELINE = next(iter(METHODS))


def _uses_ranks(strategy: str) -> bool:
    """True if more ranks share the work of a strategy; strategies of other packages may be in a file too."""
    return strategy not in METHODS or METHODS[strategy].uses_ranks


def _is_row(row: dict[str, Any]) -> bool:
    """True if a row has the fields that the tables need, with numbers where they calculate."""
    if "strategy" not in row:
        return row.keys() >= DECODE and all(row[name] >= 0 for name in DECODE - {"graph"})
    reckoned = [row[name] for name in ("seconds", "floor_seconds", "predicted_seconds", "peak_bytes")]
    reckoned += [row["length"], *(row["parts"] or {}).values()]
    whole = row.keys() >= PREFILL and isinstance(row["plan"], dict)
    return whole and all(number is None or number >= 0 for number in reckoned)


def _read(path: Path) -> dict[str, Any]:
    """Read one report; InputError if the file is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        known = "model" in report and isinstance(report["fingerprint"], dict)
        known = known and min(report["layers"], report["ranks"]) > 0 and all(map(_is_row, report["rows"]))
    except OSError as error:
        raise InputError(f"The results in {str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise InputError(f"{str(path)!r} is not a result file of apb bench prefill or decode (written with --out).")
    return dict(report)
