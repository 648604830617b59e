"""Plots of ``apb bench prefill`` as SVG text: seconds against length, and seconds by part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.plots import COLOURS, MARKS, drawing, finish, mark_lengths, svg
from .results import Point, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3


def plots(results: Results) -> dict[str, tuple[str, str]]:
    """(caption, SVG) of each plot that the results allow, by a short name.

    Raises:
        InputError: matplotlib is not installed.
    """
    drawn: dict[str, tuple[str, str]] = {}
    with drawing() as new_figure:
        if any(point.seconds for point in results.prefill):
            figure = new_figure(figsize=(6.8, 4.0), layout="constrained")
            by_length(figure, results)
            caption = f"Seconds of prefill against length, {results.model}"
            drawn["seconds"] = caption, svg(figure, caption)
        lengths = [length for length in results.lengths if clocked(results, length)]
        if lengths:
            lines = -(-len(lengths) // COLUMNS)
            figure = new_figure(figsize=(3.2 * min(len(lengths), COLUMNS) + 1.4, 3.0 * lines), layout="constrained")
            by_part(figure, results, lengths)
            caption = f"Where the seconds of a prefill go, on the first rank, {results.model}"
            drawn["parts"] = caption, svg(figure, caption)
    return drawn


def write_plots(results: Results, beside: Path) -> list[tuple[str, Path]]:
    """Write every plot beside a file as ``<stem>_<name>.svg``; returns (caption, path) of each."""
    written = []
    for name, (caption, text) in plots(results).items():
        path = beside.with_name(f"{beside.stem}_{name}.svg")
        path.write_text(text + "\n", encoding="utf-8")
        written.append((caption, path))
    return written


def clocked(results: Results, length: int) -> list[Point]:
    """Points of a length that ran all layers and whose parts were timed."""
    return [point for point in results.prefill if point.length == length and point.row["parts"] and point.scale == 1]


def by_length(figure: Figure, results: Results) -> None:
    """Draw a line for every reading, both axes logarithmic."""
    axes = figure.subplots()
    for number, name in enumerate(results.names):
        points = [(p.length, p.seconds) for p in results.prefill if p.name == name and p.seconds]
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), label=name, markersize=4, color=colour, marker=mark)
    mark_lengths(axes, results.lengths)
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(lambda seconds, _: f"{seconds:g}" if f"{seconds:.1e}"[0] in "1235" else "")
    axes.set_ylabel("seconds")
    finish(figure, axes)


def by_part(figure: Figure, results: Results, lengths: list[int]) -> None:
    """Draw axes for every length with a bar for every reading, its parts stacked."""
    lines = -(-len(lengths) // COLUMNS)
    fields = figure.subplots(lines, min(len(lengths), COLUMNS), squeeze=False).flatten()
    for axes in fields[len(lengths) :]:
        axes.set_visible(False)
    for axes, length in zip(fields, lengths, strict=False):
        points = clocked(results, length)
        below = [0.0] * len(points)
        for number, part in enumerate(points[0].row["parts"]):
            heights = [max(point.row["parts"][part], 0.0) for point in points]
            # One legend for all axes, which have the same parts.
            label = part if axes is fields[0] else None
            axes.bar(range(len(points)), heights, 0.7, below, label=label, color=COLOURS[number % len(COLOURS)])
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axes.set_xticks(range(len(points)), [point.name for point in points], rotation=40, ha="right")
        axes.set_title(f"{length:,} tokens", fontsize=9)
        axes.set_ylabel("seconds")
        finish(figure, axes)
