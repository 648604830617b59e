"""Reports of evaluation results: one self-contained HTML page, or Markdown."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from .plots import place, plots
from .statistics import Cell, Difference
from .summary import Comparison, Summary, Table

TITLE = "apb: accuracy of every way to read"
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto; padding: 0 1rem;
  max-width: 76rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
td:first-child, th:first-child { text-align: left; }
td small { display: block; color: #666; font-size: .78em; font-weight: normal; }
td.best { font-weight: 600; }
td.worse { background: #fdecea; }
td.better { background: #e8f5e9; }
figure { margin: 1rem 0; }
figcaption, .note { color: #555; font-size: .9rem; }
svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
@media (max-width: 40rem) {
  td:first-child, th:first-child { position: sticky; left: 0; background: #fff; min-width: 7rem; white-space: normal;
    overflow-wrap: anywhere; }
}
"""
NOTES = (
    "Scores are 0 to 100. Under each: its 95 % interval (Wilson). Samples that failed count as 0. "
    "Average: the mean of the tasks.",
    "Differences are paired: the same samples, read in the other way; 3/100: of 100 samples 3 have another score. "
    "Their 95 % intervals come from 10,000 bootstrap resamples of the samples within each task. Where no sample "
    "differs the interval has no width; then, with n samples, fewer than 1 - 0.05^(1/n) of all differ, with 95 % "
    "confidence (n = 100: 3 %).",
    "Speeds are of runs that had the machine to themselves; scores may come from runs that shared it.",
)


def html(summary: Summary, sources: list[str]) -> str:
    """The report as one HTML page, with plots inlined."""
    parts = [f"<h1>{escape(TITLE)}</h1>", *(f"<p>{escape(line)}</p>" for line in about(summary, sources))]
    drawn = plots(summary)
    for table in summary.tables:
        parts.append(f"<h2>{escape(place(table, summary))}</h2>")
        parts.append(html_table(*overview(table, summary)))
        parts.append(html_table(*scores(table), mark=best_marks(table)))
        for one in table.comparisons:
            if one.whole:
                parts.append(f"<p>Difference to {escape(one.baseline)}, in points:</p>")
                parts.append(html_table(*differences(table, one), mark=sign_marks(table, one)))
    parts.append("<h2>Plots</h2>")
    parts += [f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for caption, svg in drawn]
    if summary.speeds:
        parts += ["<h2>Speed of prefill</h2>", html_table(*speeds(summary))]
    parts += ["<h2>How to read this</h2>", *(f'<p class="note">{escape(note)}</p>' for note in NOTES)]
    return page(TITLE, parts)


def page(title: str, parts: list[str]) -> str:
    """An HTML page with inlined style."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def markdown(summary: Summary, sources: list[str]) -> str:
    """The report's tables as Markdown."""
    parts = [f"# {TITLE}", *about(summary, sources)]
    for table in summary.tables:
        parts += [f"## {place(table, summary)}", markdown_table(*overview(table, summary))]
        parts.append(markdown_table(*scores(table)))
        for one in table.comparisons:
            if one.whole:
                parts += [f"Difference to {one.baseline}, in points:", markdown_table(*differences(table, one))]
    if summary.speeds:
        parts += ["## Speed of prefill", markdown_table(*speeds(summary))]
    return "\n\n".join([*parts, "## How to read this", *NOTES]) + "\n"


def about(summary: Summary, sources: list[str]) -> list[str]:
    """Answers, models, devices and source files of the results."""
    devices = ", ".join(summary.devices)
    return [
        f"{summary.answers:,} answers of {'; '.join(summary.models)}, on {devices}, from {', '.join(sources)}.",
    ]


Content = tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]
"""Column heads, then rows: a name, and (figure, remark) per column."""


def scores(table: Table) -> Content:
    """Scores with their intervals, and the number of samples if it differs between cells."""
    counts = {cell.samples for row in table.cells.values() for cell in row.values()}
    rows = []
    for reading, row in table.cells.items():
        average = table.average(reading)
        figures = [score(row.get(task), len(counts) > 1) for task in table.tasks]
        rows.append((reading, [*figures, ("" if average is None else f"{average:.1f}", "")]))
    samples = f"{min(counts)} samples" if len(counts) == 1 else f"{min(counts)} to {max(counts)} samples"
    return [samples, *table.tasks, "average"], rows


def score(cell: Cell | None, with_count: bool) -> tuple[str, str]:
    """A score and its interval, and how many samples have no answer, if any."""
    if cell is None:
        return "", ""
    low, high = cell.interval
    remarks = [f"{low:.1f} to {high:.1f}"]
    remarks += [f"n {cell.samples}"] if with_count else []
    remarks += [f"{cell.failed} failed"] if cell.failed else []
    return f"{cell.score:.1f}", ", ".join(remarks)


def overview(table: Table, summary: Summary) -> Content:
    """Averages over the tasks, their differences to the baselines, and seconds of prefill where they are known."""
    seconds = {speed.reading: speed for speed in summary.speeds if speed.place == table.place}
    compared = [one for one in table.comparisons if one.whole]
    rows = []
    for reading in table.cells:
        average = table.average(reading)
        figures = [("" if average is None else f"{average:.1f}", "")]
        for one in compared:
            whole = one.whole.get(reading)
            figures.append(points(whole if whole and whole.tasks == len(table.tasks) else None))
        if seconds:
            speed = seconds.get(reading)
            figures.append((f"{speed.seconds:.3f}", f"n {speed.samples}") if speed else ("", ""))
        rows.append((reading, figures))
    heads = [
        f"{len(table.tasks)} task{'s' * (len(table.tasks) > 1)}",
        "average",
        *(f"to {one.baseline}" for one in compared),
    ]
    return heads + (["prefill s, median"] if seconds else []), rows


def differences(table: Table, compared: Comparison) -> Content:
    """Differences to a baseline, per task and over all tasks."""
    rows = []
    for reading, whole in compared.whole.items():
        found = [compared.by_task[reading].get(task) for task in table.tasks]
        rows.append((reading, [points(one) for one in [*found, whole if whole.tasks == len(table.tasks) else None]]))
    return ["", *table.tasks, "average"], rows


def points(one: Difference | None) -> tuple[str, str]:
    """A difference and its interval."""
    if one is None:
        return "", ""
    low, high = one.interval
    return f"{one.difference:+.1f}", f"{low:+.1f} to {high:+.1f}, {one.differing}/{one.samples}"


def speeds(summary: Summary) -> Content:
    """Median tokens per second, one column per suite and length, and model if there are several."""
    columns = sorted({speed.place for speed in summary.speeds})
    known = {(speed.reading, speed.place): speed for speed in summary.speeds}
    rows = []
    for reading in dict.fromkeys(speed.reading for speed in summary.speeds):
        row = [known.get((reading, column)) for column in columns]
        rows.append((reading, [(f"{one.tokens_per_s:,.0f}", f"n {one.samples}") if one else ("", "") for one in row]))
    several = len(summary.models) > 1
    names = [f"{f'{model} ' if several else ''}{suite} {length:,}" for model, suite, length in columns]
    return ["tokens/s, median", *names], rows


Mark = Callable[[int, int], str]


def best_marks(table: Table) -> Mark:
    """Mark the best score of a column, unless all scores are equal."""
    readings = list(table.cells)

    def mark(row: int, column: int) -> str:
        if column == len(table.tasks):
            values = [table.average(reading) for reading in readings]
        else:
            cells = [table.cells[reading].get(table.tasks[column]) for reading in readings]
            values = [None if cell is None else cell.score for cell in cells]
        known = [value for value in values if value is not None]
        return "best" if values[row] is not None and values[row] == max(known) > min(known) else ""

    return mark


def sign_marks(table: Table, compared: Comparison) -> Mark:
    """Mark a difference if its interval does not contain 0."""
    readings = list(compared.whole)

    def mark(row: int, column: int) -> str:
        reading = readings[row]
        whole = column == len(table.tasks)
        one = compared.whole[reading] if whole else compared.by_task[reading].get(table.tasks[column])
        if one is None or one.interval[0] <= 0 <= one.interval[1] or (whole and one.tasks < len(table.tasks)):
            return ""
        return "better" if one.difference > 0 else "worse"

    return mark


def html_table(heads: list[str], rows: list[tuple[str, list[tuple[str, str]]]], mark: Mark | None = None) -> str:
    """An HTML table; ``mark`` gives the CSS class of the cell at (row, column)."""
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for row, (name, figures) in enumerate(rows):
        cells = [f"<td>{escape(name)}</td>"]
        for column, (figure, remark) in enumerate(figures):
            kind = mark(row, column) if mark else ""
            start = f'<td class="{kind}">' if kind else "<td>"
            cells.append(f"{start}{escape(figure)}{f'<small>{escape(remark)}</small>' if remark else ''}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def markdown_table(heads: list[str], rows: list[tuple[str, list[tuple[str, str]]]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, figures in rows:
        cells = (f"{figure} ({remark})" if remark else figure for figure, remark in figures)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)
