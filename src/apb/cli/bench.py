"""``apb bench``: how fast, beside a baseline and the floor."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options

app = typer.Typer(help="How fast, beside a baseline of the same run and the floor.")


@app.callback()
def _group() -> None:
    """How fast, beside a baseline of the same run and the floor."""


@dataclass(frozen=True)
class Request:
    """Everything a rank needs; plain values, so that it travels."""

    model: str | None
    random_weights: str | None
    layers: int | None
    strategies: list[str]
    lengths: list[int]
    repeat: int
    reading: dict[str, Any]
    dtype: str | None
    device: str
    out: str | None
    as_json: bool
    command: str


@app.command()
def prefill(
    length: Annotated[list[int], typer.Option(help="Tokens of the prompt; repeatable.")],
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategies, the baseline first; repeatable. By default full and apb.")
    ] = None,
    model: options.Model = None,
    random_weights: Annotated[
        str | None, typer.Option(help="A model shape with random weights instead, such as llama-3.1-8b.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With random weights: only so many layers.")] = None,
    repeat: Annotated[int, typer.Option(help="Counted repeats; the median is reported.")] = 3,
    blocks: options.Blocks = None,
    rounds: options.Rounds = None,
    ranks: options.Ranks = None,
    anchor_length: options.AnchorLength = None,
    passing_length: options.PassingLength = None,
    compressor: options.Compressor = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Prefill by several strategies and lengths: seconds, tokens per second, share of the floor, peak memory."""
    from ..distributed import launch
    from ..errors import InputError
    from ..hf import loading
    from ..hf.random_weights import shape_config
    from ..plan import at_least, method_of
    from .quiet import quiet_libraries

    quiet_libraries()
    at_least("repeat", repeat, 1)
    if model and random_weights:
        raise InputError("Give a model or a shape with random weights, not both.")
    if random_weights:
        shape_config(random_weights)
    names = strategy or ["full", "apb"]
    for name in names:
        method_of(name)
    place = loading.pick_device(device)
    size = launch.ranks_to_use(ranks, place)
    request = Request(
        model=None if random_weights else str(model or loading.shipped_model()),
        random_weights=random_weights,
        layers=layers,
        strategies=names,
        lengths=length,
        repeat=repeat,
        reading={
            "blocks": blocks,
            "rounds": rounds,
            "anchor_length": anchor_length,
            "passing_length": passing_length,
            "compressor": compressor,
        },
        dtype=dtype,
        device=place.type,
        out=None if out is None else str(out),
        as_json=as_json,
        command="apb " + " ".join(sys.argv[1:]),
    )
    launch.run(run, size, request)


def run(request: Request) -> None:
    """One rank's part; rank 0 prints."""
    from ..benchmarks.ceilings import measure_ceilings
    from ..benchmarks.prefill import bench_prefill
    from ..distributed import launch
    from ..hardware import fingerprint
    from ..hf import loading
    from ..hf.random_weights import random_model, shape_config
    from .quiet import quiet_libraries

    quiet_libraries()
    device = launch.local_device(loading.pick_device(request.device))
    dtype = loading.pick_dtype(request.dtype, device)
    group = launch.join(device)
    if request.random_weights:
        config = shape_config(request.random_weights, request.layers)
        model = random_model(config, dtype, device)
    else:
        assert request.model is not None
        config = loading.load_config(request.model)
        model = loading.load_model(request.model, dtype, device)
    ceilings = measure_ceilings(device, dtype, group)
    rows = []
    for row in bench_prefill(
        model,
        loading.model_shape(config),
        ceilings,
        request.strategies,
        request.lengths,
        request.repeat,
        **request.reading,
    ):
        rows.append(row.to_dict())
        report = {
            "command": request.command,
            "model": request.random_weights or request.model,
            "layers": config.get_text_config().num_hidden_layers,
            "ranks": group.size,
            "fingerprint": fingerprint(device, dtype),
            "ceilings": asdict(ceilings),
            "rows": rows,
        }
        if group.rank == 0:
            print(_line(rows[-1]), file=sys.stderr, flush=True)
            if request.out:
                Path(request.out).write_text(json.dumps(report, indent=1) + "\n")
    if group.rank == 0:
        if request.as_json:
            print(json.dumps(report))
        else:
            _print(report)
    launch.leave()


def _line(row: dict[str, Any]) -> str:
    figure = row["note"] or f"{row['seconds']:.3f} s"
    return f"apb: {row['strategy']} at {row['length']:,} tokens: {figure}"


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    ceilings, facts = report["ceilings"], report["fingerprint"]
    title = f"{report['model']}, {report['layers']} layers, {report['ranks']} x {facts['device']}, {facts['dtype']}"
    columns = ("tokens", "strategy", "blocks", "seconds", "tokens/s", "floor s", "of floor", "speed-up", "peak GiB")
    table = Table(*columns, title=title)
    for row in report["rows"]:
        seconds = row["seconds"]
        table.add_row(
            f"{row['length']:,}",
            row["strategy"],
            str(row["plan"]["blocks"]),
            row["note"] or f"{seconds:.3f}",
            "" if seconds is None else f"{row['tokens_per_s']:,.0f}",
            f"{row['floor_seconds']:.3f}",
            "" if seconds is None else f"{row['of_floor']:.0%}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}",
            "" if seconds is None else f"{row['peak_bytes'] / 2**30:.1f}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a log has no edge; rich takes 80 columns for one
    console.print(table)
    parts = [row for row in report["rows"] if row["parts"]]
    if parts:
        names = list(parts[0]["parts"])
        shares = Table("tokens", "strategy", *names, title="Where a prefill's seconds go, on the first rank")
        for row in parts:
            shares.add_row(f"{row['length']:,}", row["strategy"], *(f"{row['parts'][name]:.3f}" for name in names))
        console.print(shares)
    link = f", {ceilings['link'] / 1e9:.0f} GB/s between ranks" if ceilings["link"] else ""
    console.print(
        f"Ceilings of this run: {ceilings['linear'] / 1e12:.1f} TFLOP/s linear, "
        f"{ceilings['attention'] / 1e12:.1f} attention{link}; "
        f"apb {facts['apb']}, torch {facts['torch']}, transformers {facts['transformers']}."
    )
