"""``apb report``: tables and plots from result files of ``apb eval`` or ``apb bench``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options

FORMS = (".html", ".md")


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Files that apb eval wrote with --out (.jsonl, .jsonl.gz), or apb bench prefill and decode (.json)."
        ),
    ],
    out: Annotated[list[Path], typer.Option(help="Where to write: a page (.html) or Markdown (.md); repeatable.")],
) -> None:
    """Write tables in the paper's layout and plots, from result files of accuracy or of speed."""
    for path in out:
        if path.suffix not in FORMS:
            raise InputError(f"A report is written as .html or .md, not as {str(path)!r}.")
        options.check_out(path)
    of_speed = {path.suffix == ".json" for path in results}
    if len(of_speed) > 1:
        raise InputError("A report takes files of apb eval (.jsonl) or of apb bench (.json), not both; write two.")
    text = _speed(results) if of_speed == {True} else _accuracy(results)
    for path in out:
        try:
            path.write_text(text(path), encoding="utf-8")
        except OSError as error:
            raise InputError(f"The report cannot be written to {str(path)!r}: {error.strerror}.") from error
        print(f"apb: wrote {path}", file=sys.stderr)


def _accuracy(results: list[Path]) -> Callable[[Path], str]:
    """Function from an output path to the text of an accuracy report."""
    from ..evaluation.records import read_records
    from ..evaluation.report import html, markdown
    from ..evaluation.summary import summarize

    records = [record for path in results for record in read_records(path)]
    if not records:
        raise InputError(f"There are no answers in {', '.join(repr(str(path)) for path in results)}.")
    summary = summarize(records)
    names = [path.name for path in results]
    return lambda out: html(summary, names) if out.suffix == ".html" else markdown(summary, names)


def _speed(results: list[Path]) -> Callable[[Path], str]:
    """Function from an output path to the text of a speed report; for Markdown it writes the plots beside it."""
    from ..benchmarks.plots import plots, write_plots
    from ..benchmarks.report import html, markdown
    from ..benchmarks.results import read_results

    found = read_results(results)

    def text(out: Path) -> str:
        if out.suffix == ".html":
            return html(found, plots(found))
        try:
            pictures = [(caption, path.name) for caption, path in write_plots(found, out)]
        except InputError as error:
            print(f"apb: no plots: {error}", file=sys.stderr)
            pictures = []
        return markdown(found, pictures)

    return text
