"""Prefill on 8, 16 and 64 GPUs, projected from ceilings measured in one run: every strategy at 32K to 1M tokens.

    python benchmarks/projection.py RESULT.json --out benchmarks/results/projection.json [--measured FILE ...]

RESULT.json is a result file of `apb bench prefill --out`, best of a run on two GPUs, which includes the rate between
GPUs. Costs are those of `apb plan`, prompts those of `apb bench`. The same is written as Markdown beside the JSON,
together with the measurements of the same readings in `--measured` files of `apb bench prefill`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from apb import InputError, Plan, __version__
from apb.benchmarks.prefill import QUERY_TOKENS
from apb.benchmarks.results import read_results
from apb.compressors import make_compressor
from apb.evaluation.report import markdown_table
from apb.hf.counting import model_shape
from apb.hf.random_weights import config_of, shapes
from apb.planning.cost import predict
from apb.planning.methods import METHODS
from apb.planning.projection import NETWORK_GBIT, RANKS_PER_HOST, Basis

GPUS = (8, 16, 64)
LENGTHS = tuple(1 << exponent for exponent in range(15, 21))
# apb also with MORE times as many blocks, unless they are shorter than 4K: the limit of the paper and paper_table.sh.
MORE, SHORTEST = 4, 4096


def ways(length: int, gpus: int) -> list[tuple[str, int | None]]:
    """(strategy, blocks) pairs; None leaves the number to the plan: as many as GPUs, or the paper's eight."""
    more = MORE * max(gpus, 8)
    return [*((name, None) for name in METHODS), *([("apb", more)] if length // more >= SHORTEST else [])]


def rows(basis: Basis, model: str) -> list[dict[str, Any]]:
    """The projection, one row per number of GPUs, length and reading; impossible ones are left out."""
    shape = model_shape(config_of(None, model) if model in shapes() else config_of(model, None))
    found = []
    for gpus in GPUS:
        for length in LENGTHS:
            for strategy, blocks in ways(length, gpus):
                ranks = gpus if METHODS[strategy].uses_ranks else 1
                try:
                    METHODS[strategy]().check_model(shape.heads, ranks)
                except InputError:
                    continue
                plan = Plan.build(1, length - 1 - QUERY_TOKENS, QUERY_TOKENS, blocks, ranks, strategy=strategy)
                cost = predict(plan, shape, compressor=make_compressor(), ranks_per_host=RANKS_PER_HOST).to_dict(
                    basis.ceilings
                )
                del cost["per_rank"]
                row = {"gpus": gpus, "length": length, "strategy": strategy, "more_blocks": blocks is not None}
                found.append(row | {"plan": plan.to_dict(), **cost})
    return found


def name_of(row: dict[str, Any]) -> str:
    """A row's name in the tables."""
    if not METHODS[row["strategy"]].uses_ranks:
        return f"{row['strategy']} (one GPU)"
    return f"{row['strategy']}, {MORE} times the blocks" if row["more_blocks"] else row["strategy"]


def measured_seconds(paths: list[Path]) -> dict[tuple[str, int, int, int], float]:
    """Seconds in result files by (strategy, ranks, blocks, length); full and minference run on one device."""
    found = {}
    for path in paths:
        results = read_results([path])
        for point in results.prefill:
            if point.seconds is not None and point.scale == 1:
                ranks = results.runs[0][1]["ranks"] if METHODS[point.row["strategy"]].uses_ranks else 1
                found[point.row["strategy"], ranks, point.row["plan"]["blocks"], point.length] = point.seconds
    return found


def table(found: list[dict[str, Any]], gpus: int) -> str:
    """Table of seconds on ``gpus`` GPUs: with maximal and without overlap, and measured ones where they exist."""

    def cell(row: dict[str, Any] | None) -> tuple[str, str]:
        if row is None:
            return "-", ""
        seconds, hidden, measured = row["seconds"], row["hidden_seconds"], row["measured_seconds"]
        text = f"{hidden:.3g} to {seconds:.3g}" if f"{hidden:.3g}" != f"{seconds:.3g}" else f"{seconds:.3g}"
        return text, "" if measured is None else f"measured {measured:.3g}"

    at = {(name_of(row), row["length"]): row for row in found if row["gpus"] == gpus}
    names = dict.fromkeys(name for name, _ in at)
    lines = [(name, [cell(at.get((name, length))) for length in LENGTHS]) for name in names]
    return markdown_table(["tokens", *(f"{length:,}" for length in LENGTHS)], lines)


def page(report: dict[str, Any]) -> str:
    """The projection as Markdown."""
    rates = report["ceilings"]
    units = {"linear": (1e12, "TFLOP/s"), "attention": (1e12, "TFLOP/s")}
    rows = []
    for name, source in rates["sources"].items():
        scale, unit = units.get(name, (1e9, "GB/s"))
        rows.append((name, [(f"{rates[name] / scale:,.0f} {unit}", ""), (source, "")]))
    parts = [
        f"# Projection: prefill of {report['model']} on {', '.join(map(str, GPUS))} GPUs",
        "**A projection, not a measurement.** " + f"Made by `{report['command']}`.",
        f"Seconds: from all that can be hidden to nothing hidden of what ranks send each other (ring and apb compute "
        f"while they send). Hosts of {RANKS_PER_HOST} GPUs; between them every GPU has an adapter of "
        f"{NETWORK_GBIT:g} Gbit/s, the usual layout of such hosts. Blocks: one a GPU, at least eight; anchor a quarter "
        "of a block and passing an eighth of it, at most 8K each; star's anchor a block. Left out: latencies of "
        "messages and launches, which count where a GPU has few tokens, and whether it fits in memory. Sparse "
        "attention (minference) does not reach the ceiling of dense attention, which it is given here.",
        markdown_table(["ceiling", "rate", "where it is from"], rows),
    ]
    checked = [row for row in report["run"]["rows"] if row["seconds"]]
    if checked:
        parts.append("How the run itself compares with what is predicted from its ceilings (seconds):")
        heads = ["strategy", "tokens", "ranks", "measured", "predicted", "measured / predicted"]
        lines = []
        for row in checked:
            figures = [f"{row['length']:,}", str(report["run"]["ranks"]), f"{row['seconds']:.2f}"]
            figures += [f"{row['predicted_seconds']:.2f}", f"{row['seconds'] / row['predicted_seconds']:.2f}"]
            lines.append((row["strategy"], [(figure, "") for figure in figures]))
        parts.append(markdown_table(heads, lines))
    for gpus in GPUS:
        hosts = -(-gpus // RANKS_PER_HOST)
        parts += [f"## {gpus} GPUs, {hosts} host{'s' * (hosts > 1)}", table(report["rows"], gpus)]
        widest = [row for row in report["rows"] if (row["gpus"], row["length"]) == (gpus, LENGTHS[-1])]
        peaks = (f"{name_of(row)} {row['peak_bytes_per_rank'] / 2**30:.0f}" for row in widest)
        parts.append(f"Predicted peak memory of a GPU at {LENGTHS[-1]:,} tokens, GiB: {'; '.join(peaks)}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="result file of apb bench prefill --out")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; the Markdown goes beside it")
    parser.add_argument("--measured", type=Path, nargs="+", default=[], help="results to print beside the projection")
    arguments = parser.parse_args()
    basis = Basis.of_run(arguments.result, NETWORK_GBIT)
    basis.check_link(max(GPUS))
    assert basis.run is not None
    model, measured = basis.run["model"], measured_seconds(arguments.measured)
    found = rows(basis, model)
    for row in found:
        key = (row["strategy"], row["plan"]["ranks"], row["plan"]["blocks"], row["length"])
        row["measured_seconds"] = measured.get(key)
    report = {
        "what": "a projection, not a measurement",
        "command": "python " + " ".join(sys.argv),
        "apb": __version__,
        "model": model,
        "ranks_per_host": RANKS_PER_HOST,
        "ceilings": basis.to_dict(),
        "run": {"file": arguments.result.name} | {name: basis.run[name] for name in ("ranks", "fingerprint", "rows")},
        "rows": found,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(page(report))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"projection.py: {error}")
