"""Accuracy of many settings on the shipped model, measured in parallel; used by the needle_*.py tables.

The work is split into units of a few settings and samples (one base seed each), which run in processes that share the
GPUs. All settings of a task and length answer the same samples.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines

from apb.evaluation.settings import Setting
from apb.evaluation.statistics import interval

# Settings per unit: few, so that the processes finish together; more than one, since a unit generates its own samples.
_SETTINGS = 4


@dataclass(frozen=True)
class Cell:
    """One figure of a table: the name of its row, and the setting that reads its samples."""

    task: str
    length: int
    name: str
    setting: Setting


@dataclass(frozen=True)
class Unit:
    """Some cells of one task and length, on some samples."""

    cells: tuple[Cell, ...]
    count: int
    seed: int


def arguments_of(doc: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """Parse the options that all tables share, and the table's own options ``more``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=100, help="base seed of the first unit; every unit has its own")
    parser.add_argument("--only", default="", help="regular expression on 'task length row': measure these alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--shard", type=int, default=17, help="samples of a unit")
    parser.add_argument("--out", type=Path, required="tables" not in more)
    for name, options in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **options)
    return parser.parse_args()


def measure(cells: Sequence[Cell], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cells, writing the results after every unit so that an interrupted run keeps them."""
    import torch

    from apb.hardware import fingerprint
    from apb.hf.loading import pick_device, shipped_model

    device = pick_device(None)
    cells = [cell for cell in cells if re.search(arguments.only, f"{cell.task} {cell.length} {cell.name}")]
    units = list(_units(cells, arguments.samples, arguments.shard, arguments.seed))
    sums: dict[Cell, float] = defaultdict(float)
    counts: dict[Cell, int] = defaultdict(int)
    started = time.perf_counter()
    threads = max(1, (torch.get_num_threads() if device.type == "cpu" else arguments.jobs) // arguments.jobs)

    def results() -> list[dict[str, Any]]:
        found = []
        for cell in (cell for cell in cells if counts[cell]):
            score = sums[cell] / counts[cell]
            ends = [round(end, 1) for end in interval(score, counts[cell])]
            options = cell.setting.asked
            found.append(
                {"task": cell.task, "length": cell.length, "setting": cell.name, "samples": counts[cell]}
                | {
                    "score": score,
                    "interval": ends,
                    "options": options,
                }
            )
        return found

    model = str(arguments.model or shipped_model())
    with engines.pool(model, arguments.jobs, threads) as pool:
        futures = {pool.submit(_run, unit): unit for unit in units}
        for number, future in enumerate(as_completed(futures), 1):
            unit = futures[future]
            for cell, score in zip(unit.cells, future.result(), strict=True):
                sums[cell] += score * unit.count
                counts[cell] += unit.count
            seconds = time.perf_counter() - started
            report = {
                "command": "python " + " ".join(sys.argv),
                "seeds": sorted({unit.seed for unit in units}),
                "fingerprint": fingerprint(device, torch.bfloat16),
                "seconds": seconds,
                "results": results(),
            }
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{number}/{len(units)} {seconds:.0f} s {unit.cells[0].task} {unit.cells[0].length}", flush=True)
    return results()


def _units(cells: Sequence[Cell], samples: int, shard: int, seed: int) -> Iterator[Unit]:
    """Yield the units, long texts first, so that the last ones are short."""
    for start in range(0, samples, shard):
        groups: dict[tuple[int, str], list[Cell]] = defaultdict(list)
        for cell in cells:
            groups[-cell.length, cell.task].append(cell)
        for _, group in sorted(groups.items(), key=lambda item: item[0]):
            for first in range(0, len(group), _SETTINGS):
                chosen = tuple(group[first : first + _SETTINGS])
                yield Unit(chosen, min(shard, samples - start), seed + start // shard)


def _run(unit: Unit) -> list[float]:
    """Mean scores of a unit's cells."""
    from apb.evaluation.synthetic import evaluate

    first = unit.cells[0]
    settings = [cell.setting for cell in unit.cells]
    results = evaluate(engines.engine(), [first.task], [first.length], settings, unit.count, unit.seed)
    return [result.score for result in results]
