"""Output of ``apb eval``: results as a table or as JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.records import Record


def console() -> Console:
    """Standard output for tables: as wide as the terminal, and elsewhere as wide as they may need."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def print_results(records: list[Record], as_json: bool, notes: dict[str, Any], skipped: int) -> None:
    """Print scores with their intervals, and the difference of every reading to a baseline on the same samples.

    Raises:
        InputError: there is not one answer.
    """
    failed = [record.error for record in records if record.error is not None]
    if len(failed) == len(records):
        raise InputError(f"No sample has an answer: {failed[0]}")
    if failed:
        print(f"apb: {len(failed)} samples have no answer and count as 0, the first: {failed[0]}", file=sys.stderr)

    from ..evaluation.statistics import cell, compare, grouped

    cells = [cell(group).to_dict() for group in grouped(records, lambda record: record.group).values()]
    differences = compare(records)
    if as_json:
        print(json.dumps({**notes, "skipped_lines": skipped, "results": cells, "differences": differences}))
        return
    from rich.table import Table

    columns = ("task", "length", "strategy", "question first", "compressor", "blocks", "decode", "keys read", "samples",
               "score", "95 %", "prefill s")  # fmt: skip
    table = Table(*columns)
    for row in cells:
        table.add_row(
            row["task"],
            f"{row['length']:,}",
            row["strategy"],
            "yes" if row["question_first"] else "",
            row["compressor"] or "",
            str(row["blocks"]),
            row["decode"] or "",
            "" if row["share"] is None else f"{row['share']:.1%}",
            str(row["samples"]),
            f"{row['score']:.1f}",
            "{:.1f} to {:.1f}".format(*row["interval"]),
            f"{row['prefill_s']:.2f}",
        )
    console().print(table)
    if not differences:
        return
    title = "Differences on the same samples, mean over tasks"
    table = Table("length", "reading", "to", "tasks", "samples", "differ", "points", "95 %", title=title)
    for row in differences:
        table.add_row(
            f"{row['length']:,}",
            row["reading"],
            row["baseline"],
            str(row["tasks"]),
            str(row["samples"]),
            str(row["differing"]),
            f"{row['difference']:+.2f}",
            "{:+.2f} to {:+.2f}".format(*row["interval"]),
        )
    console().print(table)
