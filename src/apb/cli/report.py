"""``apb report``: tables and plots of what ``apb eval`` wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError

FORMS = (".html", ".md")


def report(
    results: Annotated[list[Path], typer.Argument(help="Files that apb eval wrote with --out (.jsonl, .jsonl.gz).")],
    out: Annotated[list[Path], typer.Option(help="Where to write: a page (.html) or Markdown (.md); repeatable.")],
) -> None:
    """Tables in the paper's layout with intervals, differences and plots, from result files, as one HTML page."""
    for path in out:
        if path.suffix not in FORMS:
            raise InputError(f"A report is written as .html or .md, not as {str(path)!r}.")

    from ..evaluation.records import read_records
    from ..evaluation.report import html, markdown
    from ..evaluation.summary import summarize

    records = [record for path in results for record in read_records(path)]
    if not records:
        raise InputError(f"There are no answers in {', '.join(repr(str(path)) for path in results)}.")
    summary = summarize(records)
    names = [path.name for path in results]
    for path in out:
        text = html(summary, names) if path.suffix == ".html" else markdown(summary, names)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"The report cannot be written to {str(path)!r}: {error.strerror}.") from error
        print(f"apb: wrote {path}", file=sys.stderr)
