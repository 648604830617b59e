"""Draw the plots that the docs show, from committed results. Run: python docs/drawings/reports.py

Writes docs/images/plan.svg as `apb plan --plot` does, and bench-*.svg and eval-*.svg as `apb report` does. A test
checks that they are what this script draws, where matplotlib is of the version that drew them.
"""

from __future__ import annotations

from pathlib import Path

from apb.benchmarks.plots import plots as plots_of_speed
from apb.benchmarks.results import read_results
from apb.cli.plan import plan_of
from apb.cli.plan_plot import drawn
from apb.evaluation.plots import plots as plots_of_accuracy
from apb.evaluation.records import read_records
from apb.evaluation.summary import summarize

IMAGES = Path(__file__).resolve().parents[1] / "images"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
# Plots of accuracy by the beginnings of their captions; of the compressors only the default is shown.
ACCURACY = {"eval-length": "Mean accuracy of the tasks against", "eval-task": "Accuracy by task, synthetic, 32,768"}
SPEED = [f"prefill_{tokens}_h200.json" for tokens in (65536, 131072, 262144)]
LENGTH, RANKS = 131_072, 4


def drawings() -> dict[str, str]:
    """SVG text by the file's name."""
    plans = [plan_of(strategy, LENGTH, RANKS, {}, None) for strategy in ("apb", "ring")]
    speed = plots_of_speed(read_results([RESULTS / name for name in SPEED]))
    answers = read_records(RESULTS / "needle_records.jsonl.gz")
    shown = [answer for answer in answers if answer.strategy != "apb" or answer.compressor == "query-edge"]
    accuracy = plots_of_accuracy(summarize(shown))
    found = {"plan": drawn(plans, f"{LENGTH:,} tokens on {RANKS} ranks")}
    found |= {f"bench-{name}": svg for name, (_, svg) in speed.items()}
    for name, begins in ACCURACY.items():
        found[name] = next(svg for caption, svg in accuracy if caption.startswith(begins))
    return {f"{name}.svg": svg for name, svg in found.items()}


if __name__ == "__main__":
    for name, svg in drawings().items():
        (IMAGES / name).write_text(svg, encoding="utf-8")
