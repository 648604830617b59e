"""``apb plan``: the predicted cost of a document of some length, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..compressors import Compressor, make_compressor
from ..errors import InputError, at_least
from ..planning.cost import predict
from ..planning.methods import METHODS, make_method
from ..planning.plan import Plan
from ..planning.projection import NETWORK_GBIT, RANKS_PER_HOST, Basis
from ..planning.propagation import Propagation
from ..planning.shape import ModelShape
from ..reading import with_propagation
from . import options
from .groups import expanded
from .tables import console

# A short question with its chat template; the length of the document is what matters.
QUERY_TOKENS = 32


@expanded
def plan(
    *,
    length: Annotated[int, typer.Option(help="Tokens of the document.")],
    model: options.ModelName = None,
    random_weights: options.RandomWeights = None,
    chosen: options.Options,
    rounds: options.Rounds = None,
    propagation: options.Propagate = "off",
    ranks: Annotated[int | None, typer.Option(help="Devices to plan for, whether they are here or not.")] = None,
    gpus_per_rank: options.GpusPerRank = 1,
    ceilings: Annotated[
        Path | None,
        typer.Option(help="Predict seconds from the ceilings in a file that apb bench prefill --out wrote."),
    ] = None,
    ranks_per_host: Annotated[
        int | None,
        typer.Option(
            help=f"Ranks that share a host, by default {RANKS_PER_HOST} GPUs; what they send out takes the network."
        ),
    ] = None,
    network_gbit: Annotated[
        float, typer.Option(help="Gbit/s between hosts, for every rank: each with an adapter of its own.")
    ] = NETWORK_GBIT,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw who reads what, a row for each rank, as SVG; needs apb-llm[report].")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """The plan for a document of that many tokens (bfloat16, a question of 32 tokens) and its predicted costs."""
    size = 1 if ranks is None else ranks
    at_least("length", length, 1)
    at_least("ranks", size, 1)
    at_least("GPUs per rank", gpus_per_rank, 1)
    sharing = RANKS_PER_HOST // gpus_per_rank or 1 if ranks_per_host is None else ranks_per_host
    at_least("ranks per host", sharing, 1)
    if not network_gbit > 0:
        raise InputError(f"--network-gbit takes a number above 0, not {network_gbit:g}.")
    if plot is not None:
        if plot.suffix != ".svg":
            raise InputError(f"A plan is drawn as .svg, not as {str(plot)!r}.")
        options.check_out(plot)
    # Errors of the request are raised before a model is looked for.
    plans = [plan_of(name, length, size, chosen.method, rounds) for name in METHODS]
    compressor = make_compressor(chosen.compressor, chosen.scoring)
    propagated = Propagation.parsed(propagation)

    basis = _basis(ceilings, network_gbit)
    if basis is not None:
        basis.check_link(size)

    from ..hf import counting, loading, supported
    from ..hf.random_weights import config_of
    from .checks import loaded
    from .quiet import quiet_libraries

    quiet_libraries()
    config = config_of(model, random_weights)
    supported.check_supported(config)
    compressor = loaded(compressor, config)
    shape = counting.model_shape(config, gpus_per_rank)
    plans = [with_propagation(each, propagated, shape) for each in plans]
    rows = [_row(each, size, shape, compressor, basis, sharing) for each in plans]
    report = {
        "model": str(random_weights or model or "needle"),
        "length": length,
        "max_positions": loading.position_limit(config),
        "ranks_per_host": sharing,
        "gpus_per_rank": len(shape.split) or 1,
        "ceilings": None if basis is None else basis.to_dict(),
        "projection": basis is not None and basis.projects(size),
        "strategies": rows,
    }
    if plot is not None:
        from .plan_plot import drawn

        told = {row["strategy"] for row in rows if "refused" not in row}
        title = f"{length:,} tokens, {report['model']}"
        plot.write_text(drawn([each for each in plans if each.strategy in told], title), encoding="utf-8")
    if as_json:
        print(json.dumps(report))
    else:
        _print(report)


def plan_of(strategy: str, length: int, ranks: int, given: dict[str, Any], rounds: int | None) -> Plan:
    """The plan of a strategy; options apply to strategies that have them, rounds to those that read in rounds."""
    method = make_method(strategy, given, compared=True)
    taken = rounds if rounds is not None and method.in_rounds else 1
    prefix = 1 + (QUERY_TOKENS if method.question_first else 0)
    return Plan.of_method(method, prefix, length, QUERY_TOKENS, ranks if method.uses_ranks else 1, taken)


def _row(
    chosen: Plan, ranks: int, shape: ModelShape, compressor: Compressor, basis: Basis | None, ranks_per_host: int
) -> dict[str, Any]:
    """A plan and its costs, or the reason why the model cannot be read by it."""
    try:
        chosen.method.check_model(shape.heads, ranks)
    except InputError as error:
        return {"strategy": chosen.strategy, "refused": str(error)}
    cost = predict(chosen, shape, compressor=compressor, ranks_per_host=ranks_per_host)
    told = chosen.propagated()
    propagation = {} if told is None else {"propagation": told}
    costs = cost.to_dict(None if basis is None else basis.ceilings)
    return {"strategy": chosen.strategy, "exact": chosen.exact, "plan": chosen.to_dict(), **propagation, **costs}


def _basis(path: Path | None, network_gbit: float) -> Basis | None:
    """The basis of predicted seconds: a file, or the known rates of this machine's GPU."""
    if path is not None:
        return Basis.of_run(path, network_gbit)
    import torch

    return Basis.of_device(torch.cuda.get_device_name(), network_gbit) if torch.cuda.is_available() else None


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    rows = [row for row in report["strategies"] if "refused" not in row]
    unit = "rank" if report["gpus_per_rank"] == 1 else "GPU"
    seconds = "seconds, projection" if report["projection"] else "seconds"
    table = Table(title=f"{report['length']:,} tokens, {report['model']}")
    table.add_column("")
    for row in rows:
        table.add_column(row["strategy"], justify="right")
    lines = {
        "exact": lambda row: "yes" if row["exact"] else "no",
        "ranks": lambda row: str(row["plan"]["ranks"]),
        "blocks": lambda row: f"{row['plan']['blocks']:,}",
        "rounds": lambda row: str(row["plan"]["rounds"]),
        "anchor length": lambda row: f"{row['plan']['anchor_length']:,}",
        "passing length": lambda row: f"{row['plan']['passing_length']:,}",
        "passing budget": lambda row: f"{row['plan']['passing_budget']:,}" if "passing_budget" in row["plan"] else "",
        "linear FLOPs": lambda row: f"{row['linear_flops']:.3g}",
        "attention FLOPs": lambda row: f"{row['attention_flops']:.3g}",
        "sent per rank": lambda row: _bytes(row["sent_bytes_per_rank"]),
        "of it to other hosts": lambda row: _bytes(row["network_bytes_per_rank"]),
        f"cache per {unit}": lambda row: _bytes(row[f"cache_bytes_per_{unit.lower()}"]),
        f"peak per {unit}": lambda row: _bytes(row[f"peak_bytes_per_{unit.lower()}"]),
        seconds: lambda row: "unknown here" if row["seconds"] is None else f"{row['seconds']:.3g}",
    }
    if report["ceilings"]:
        lines["with sends hidden"] = lambda row: f"{row['hidden_seconds']:.3g}"
    for name, cell in lines.items():
        cells = [cell(row) for row in rows]
        if any(cells):
            table.add_row(name, *cells)
    console().print(table)
    for row in report["strategies"]:
        if "refused" in row:
            console().print(row["refused"])
    if report["ceilings"]:
        if report["projection"]:
            console().print("A projection, not a measurement: the ceilings are of fewer ranks, latencies are left out.")
        for name, source in report["ceilings"]["sources"].items():
            unit = "TFLOP/s" if name in ("linear", "attention") else "TB/s"
            console().print(f"{name}: {report['ceilings'][name] / 1e12:.4g} {unit}, {source}", highlight=False)
    limit = report["max_positions"]
    if limit is not None and report["length"] > limit:
        console().print(f"The model was trained for {limit:,} positions: reading this needs --allow-extrapolation.")


def _bytes(number: int) -> str:
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
