"""Plots of a report as SVG text, by matplotlib: accuracy by task, by length, and against speed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import InputError
from .summary import Summary, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that are safe for most colour-blind readers (Okabe and Ito); after eight they repeat with another mark
# or hatching.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a", "#000000")
MARKS = "osD^vP*X"
HATCHES = ("", "////", "....")


@contextmanager
def drawing() -> Iterator[type[Figure]]:
    """Context with the plots' style; yields matplotlib's Figure class. InputError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "Plots need matplotlib, which is not installed; install apb-llm[report]. Markdown tables do not need it."
        ) from error

    # Text as paths: a page looks the same whatever fonts are installed.
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 9, "font.family": "sans-serif"}):
        yield Figure


def plots(summary: Summary) -> list[tuple[str, str]]:
    """(caption, SVG) of every plot that the results allow; InputError if matplotlib is not installed."""
    with drawing() as new_figure:
        drawn: list[tuple[str, Figure]] = []
        for table in summary.tables:
            figure = new_figure(figsize=(max(6.0, 1.2 + 1.3 * len(table.tasks)), 3.4), layout="constrained")
            by_task(figure, table, summary)
            drawn.append((f"Accuracy by task, {place(table, summary)}; bars: 95 % intervals", figure))
        for model, suite in dict.fromkeys((table.model, table.suite) for table in summary.tables):
            tables = [table for table in summary.tables if (table.model, table.suite) == (model, suite)]
            if len(tables) > 1:
                figure = new_figure(figsize=(6.4, 3.6), layout="constrained")
                by_length(figure, tables, summary)
                whose = f"{model}, " if len(summary.models) > 1 else ""
                drawn.append((f"Mean accuracy of the tasks against length, {whose}{suite}", figure))
        for table in summary.tables:
            figure = new_figure(figsize=(6.4, 3.6), layout="constrained")
            if by_speed(figure, table, summary):
                drawn.append((f"Mean accuracy of the tasks against speed of prefill, {place(table, summary)}", figure))
        return [(caption, svg(figure, caption)) for caption, figure in drawn]


def place(table: Table, summary: Summary) -> str:
    """Suite and length as text, and the model if there are several."""
    model = f"{table.model}, " if len(summary.models) > 1 else ""
    return f"{model}{table.suite}, {table.length:,} tokens"


def look(summary: Summary, reading: str) -> tuple[str, str]:
    """Colour and mark of a reading, the same in every plot."""
    number = summary.readings.index(reading)
    return COLOURS[number % len(COLOURS)], MARKS[number // len(COLOURS) % len(MARKS)]


def by_task(figure: Figure, table: Table, summary: Summary) -> None:
    """Draw a group of bars per task, one bar per reading, with their intervals."""
    axes = figure.subplots()
    width = 0.8 / len(table.cells)
    for number, (reading, row) in enumerate(table.cells.items()):
        colour, _ = look(summary, reading)
        places = [table.tasks.index(task) - 0.4 + (number + 0.5) * width for task in row]
        scores = [cell.score for cell in row.values()]
        low = [cell.score - cell.interval[0] for cell in row.values()]
        high = [cell.interval[1] - cell.score for cell in row.values()]
        whiskers = {"elinewidth": 0.6, "ecolor": "#444444"}
        hatch = HATCHES[summary.readings.index(reading) // len(COLOURS) % len(HATCHES)]
        bars = axes.bar(places, scores, width, label=reading, color=colour, yerr=[low, high], error_kw=whiskers)
        for bar in bars:
            bar.set(hatch=hatch, edgecolor="white", linewidth=0)
    axes.set_xticks(range(len(table.tasks)), table.tasks)
    axes.set_ylim(0, 105)
    axes.set_ylabel("score")
    finish(figure, axes)


def by_length(figure: Figure, tables: list[Table], summary: Summary) -> None:
    """Draw a line per reading over the lengths at which it answered all tasks."""
    axes = figure.subplots()
    for reading in summary.readings:
        points = [(table.length, table.average(reading)) for table in tables if reading in table.cells]
        points = [(length, average) for length, average in points if average is not None]
        colour, mark = look(summary, reading)
        if points:
            axes.plot(*zip(*points, strict=True), marker=mark, color=colour, label=reading, markersize=4, alpha=0.85)
    lengths = sorted({table.length for table in tables})
    mark_lengths(axes, lengths)
    axes.set_ylabel("mean score")
    finish(figure, axes)


def by_speed(figure: Figure, table: Table, summary: Summary) -> bool:
    """Draw a point per reading with a known speed; returns True if there was one."""
    axes = figure.subplots()
    drawn = False
    for speed in summary.speeds:
        average = table.average(speed.reading) if speed.reading in table.cells else None
        if speed.place == table.place and average is not None:
            colour, mark = look(summary, speed.reading)
            axes.scatter(speed.tokens_per_s, average, color=colour, marker=mark, label=speed.reading, zorder=3)
            drawn = True
    axes.set_xlabel("prompt tokens per second of prefill")
    axes.set_ylabel("mean score")
    finish(figure, axes)
    return drawn


def mark_lengths(axes: Axes, lengths: list[int]) -> None:
    """Label the x axis with lengths in tokens, on a base-2 logarithmic scale."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def finish(figure: Figure, axes: Axes) -> None:
    """Add grid, frame and legend, the same for all plots; the legend is below, for which the figure grows."""
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if labels := axes.get_legend_handles_labels()[1]:
        columns = max(int(figure.get_figwidth() / (0.5 + 0.065 * max(map(len, labels)))), 1)
        columns = min(columns, len(labels))
        figure.set_figheight(figure.get_figheight() + 0.1 + 0.18 * -(-len(labels) // columns))
        figure.legend(loc="outside lower left", frameon=False, fontsize=8, ncols=columns)


def svg(figure: Figure, caption: str) -> str:
    """The figure as an SVG element to embed in an HTML page."""
    import matplotlib

    buffer = io.StringIO()
    # Ids of different plots on one page must differ: salt their hashes with the caption.
    with matplotlib.rc_context({"svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
