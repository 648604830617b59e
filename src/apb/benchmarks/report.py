"""Reports of ``apb bench prefill`` and ``decode``: tables in the layout of the paper's 14, 16 and 18, and plots."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from ..evaluation.report import Content, html_table, markdown_table, page
from .results import Point, Results, sessions_of

TITLE = "apb: how fast a prompt is read"
NOTES = (
    "Seconds are medians of the slowest rank, warm-up apart. Full attention runs on one device, whatever the number of "
    "ranks. Parts are those of one more prefill on the first rank; communication is what was waited for.",
    "Of floor: what the plan's FLOPs alone take at the ceilings measured in the same run, over the seconds. "
    "Prediction: how far above (+) or below (-) the seconds the plan's prediction is, which counts the bytes sent and "
    "moved too, and hides nothing.",
)


def html(results: Results, drawn: dict[str, tuple[str, str]]) -> str:
    """The report as one HTML page, with plots (caption, SVG) inlined."""
    parts = [f"<h1>{escape(TITLE)}</h1>", *(f"<p>{escape(line)}</p>" for line in about(results))]
    for title, content in tables(results):
        parts += [f"<h2>{escape(title)}</h2>", html_table(*content)]
    parts += [f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for caption, svg in drawn.values()]
    parts += [f'<p class="note">{escape(note)}</p>' for note in (*notes(results), *NOTES)]
    return page(TITLE, parts)


def markdown(results: Results, pictures: list[tuple[str, str]]) -> str:
    """The report as Markdown, with links to plots (caption, file)."""
    parts = [f"# {TITLE}", *about(results)]
    for title, content in tables(results):
        parts += [f"## {title}", markdown_table(*content)]
    parts += [f"![{caption}]({file})" for caption, file in pictures]
    return "\n\n".join([*parts, "## Notes", *(f"- {note}" for note in (*notes(results), *NOTES))]) + "\n"


def about(results: Results) -> list[str]:
    """Model, devices, versions and source files of the results."""
    devices = dict.fromkeys(
        f"{report['ranks'] * report.get('tensor_parallel', 1)} x {report['fingerprint']['device']}, "
        f"{report['fingerprint']['dtype']}, torch {report['fingerprint']['torch']}, "
        f"transformers {report['fingerprint']['transformers']}"
        for _, report in results.runs
    )
    files = ", ".join(name for name, _ in results.runs)
    return [f"{results.model} on {'; '.join(devices)}; from {files}, each with the command that made it."]


def notes(results: Results) -> list[str]:
    """Missing figures with their reasons, and figures that are scaled."""
    missing = [f"{point.name} at {point.length:,}: {point.note}." for point in results.prefill if point.note]
    scaled = {f"{p.name}: seconds of {p.layers} layers times {p.scale:g}." for p in results.prefill if p.scale > 1}
    return [*missing, *sorted(scaled)]


def tables(results: Results) -> list[tuple[str, Content]]:
    """(title, content) of every table that has figures."""
    found: list[tuple[str, Content]] = []
    if results.prefill:
        found = [
            ("Seconds of prefill", by_length(results, lambda point: f"{point.seconds:.3f}")),
            ("Tokens per second", by_length(results, lambda point: f"{point.length / (point.seconds or 1):,.0f}")),
            ("Times as fast as full attention on one device", by_length(results, lambda p: speedup(results, p))),
            ("Of floor (prediction)", by_length(results, of_floor)),
            ("Attention kernel", by_length(results, lambda point: str(point.row["backend"]))),
            ("Peak memory of a rank, GiB", by_length(results, peak)),
        ]
    for length in results.lengths:
        rows = [(point.name, parts(point)) for point in results.prefill if point.length == length]
        rows = [(name, figures) for name, figures in rows if figures]
        if rows:
            names = next(p.row["parts"] for p in results.prefill if p.length == length and p.row["parts"])
            heads = ["milliseconds", *names, "sum"]
            found.append((f"A layer at {length:,} tokens", (heads, rows)))
    if results.decode:
        found.append(("Decode", decode(results)))
    return found


def by_length(results: Results, figure: Callable[[Point], str]) -> Content:
    """A row for every reading and a column for every length, with a dash for missing figures."""

    def cell(name: str, length: int) -> tuple[str, str]:
        point = results.point(name, length)
        return ("-" if point is None or point.seconds is None else figure(point)), ""

    rows = [(name, [cell(name, length) for length in results.lengths]) for name in results.names]
    return ["tokens", *(f"{length:,}" for length in results.lengths)], rows


def speedup(results: Results, point: Point) -> str:
    """Speed-up over full attention at the same length."""
    baseline = results.baseline(point.length)
    return "-" if baseline is None or not point.seconds else f"{baseline / point.seconds:.2f}"


def of_floor(point: Point) -> str:
    """The floor as a share of the seconds, and the prediction's relative error."""
    seconds = point.row["seconds"]
    return f"{point.row['floor_seconds'] / seconds:.0%} ({point.row['predicted_seconds'] / seconds - 1:+.0%})"


def peak(point: Point) -> str:
    """Peak memory of a rank in GiB, or a dash if not all layers were run."""
    return f"{point.row['peak_bytes'] / 2**30:.1f}" if point.scale == 1 else "-"


def parts(point: Point) -> list[tuple[str, str]]:
    """Milliseconds of a layer by part and in total; empty if parts were not timed."""
    seconds = point.row["parts"]
    if not seconds:
        return []
    figures = [1e3 * each / point.layers for each in seconds.values()]
    return [(f"{figure:.2f}", "") for figure in (*figures, sum(figures))]


def decode(results: Results) -> Content:
    """A row for every length, number of sessions and way to read their tokens."""
    rows = []
    for ranks, row in results.decode:
        figures = (f"{row['tokens_per_s']:.1f}", f"{1e3 * row['seconds']:.2f}", f"{1e3 * row['limit_seconds']:.2f}")
        method = row.get("decode", "exact")  # older files have no other
        how = (str(ranks), method, sessions_of(row), "yes" if row["graph"] else "no", *figures)
        rows.append(
            (
                f"{row['length']:,}",
                [(cell, "") for cell in (*how, f"{row['of_limit']:.0%}", f"{row['peak_bytes'] / 2**30:.1f}")],
            )
        )
    heads = ["tokens", "ranks", "decode", "sessions", "CUDA graph"]
    return [*heads, "tokens/s", "ms a token", "limit ms", "of limit", "peak GiB"], rows
