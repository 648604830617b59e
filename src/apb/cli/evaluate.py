"""``apb eval``: how well the model answers, strategy by strategy."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from . import options

app = typer.Typer(help="How well the model answers, strategy by strategy.")


@app.callback()
def _group() -> None:
    """How well the model answers, strategy by strategy."""


@app.command()
def synthetic(
    task: Annotated[list[str], typer.Option(help="Kind of question; repeat it for several.")],
    length: Annotated[list[int], typer.Option(help="Tokens of prompt and answer together; repeatable.")],
    samples: Annotated[int, typer.Option(help="Samples of each task and length.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    strategy: Annotated[list[str] | None, typer.Option(help="full, star or apb (the default); repeatable.")] = None,
    blocks: Annotated[list[int] | None, typer.Option(help="Blocks of the document; repeatable.")] = None,
    compressor: Annotated[list[str] | None, typer.Option(help="Compressor of apb; repeatable.")] = None,
    heads: options.Heads = None,
    anchor_length: options.AnchorLength = None,
    passing_length: options.PassingLength = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Score generated long-context tasks: every strategy answers the same samples."""
    from ..engine import Engine
    from ..errors import InputError
    from ..evaluation.synthetic import evaluate, settings
    from ..hf import loading
    from .progress import Bar
    from .quiet import quiet_libraries

    quiet_libraries()
    if heads is not None and "retaining" not in (compressor or []):
        raise InputError("Heads were given but no compressor uses them; add --compressor retaining.")
    path = None if heads is None else str(heads)
    chosen = settings(strategy or ["apb"], blocks or [], compressor or [], anchor_length, passing_length, path)
    engine = Engine.from_pretrained(model or loading.shipped_model(), dtype=dtype, device=device)
    prints = engine.group.rank == 0
    with Bar("Answering", "sample", shown=prints) as bar:
        results = [result.to_dict() for result in evaluate(engine, task, length, chosen, samples, seed, bar.update)]
    if not prints:
        return
    if as_json:
        print(json.dumps({"seed": seed, "results": results}))
    else:
        _print(results)


def _print(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "length", "strategy", "compressor", "blocks", "samples", "score")
    for row in results:
        table.add_row(
            row["task"],
            f"{row['length']:,}",
            row["strategy"],
            row["compressor"] or "",
            str(row["blocks"]),
            str(row["samples"]),
            f"{row['score']:.1f}",
        )
    Console().print(table)
