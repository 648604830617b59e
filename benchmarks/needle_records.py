"""Every answer of the shipped model, strategy by strategy: the records of the committed report.

    python benchmarks/needle_records.py --jobs 28 --out benchmarks/results/needle_records.jsonl
    apb report benchmarks/results/needle_records.jsonl.gz --out benchmarks/results/needle_report.html

All readings answer the same samples. First a single process answers a few, to measure speeds. The rest is split into
units of a few samples, which run in processes that share the GPUs. An interrupted run keeps its records in the .jsonl
file and resumes from it when started again; a complete one writes everything into .jsonl.gz.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import engines
from answering import Unit, answer, remaining, run

from apb.evaluation.settings import Setting

if TYPE_CHECKING:
    from apb.evaluation.records import Record

FIRST_SEED = 100
TASKS = ("headings", "variable_tracking", "multivalue", "multiquery", "multikey", "single")
LENGTHS = (32768, 16384, 4096)
BLOCKS = (8, 4)
# Kinds in which a late block depends on an early one: these get the ablations of passing.
NEED_EARLIER = ("headings",)
# Answers by a single process, per length and reading, after one that is not counted.
TIMED = 3


def readings(task: str, heads: str | None) -> list[Setting]:
    """All readings: exact first, and minference, which is slow, last."""
    found = [Setting.of("full")]
    for blocks in BLOCKS:
        found.append(Setting.of("star", blocks=blocks))
        found += [Setting.of("apb", name, blocks=blocks) for name in ("query-edge", "query")]
        if heads:
            found.append(Setting.of("apb", "retaining", blocks=blocks, heads=heads))
        if task in NEED_EARLIER:
            found.append(Setting.of("apb", "query", blocks=blocks, passing_length=0))
            found.append(Setting.of("apb", "random", blocks=blocks))
    return [*found, Setting.of("minference")]


def units(arguments: argparse.Namespace) -> Iterator[Unit]:
    """All samples of all cells: long ones first, and minference after everything else."""
    for last in (False, True):
        for length in LENGTHS:
            for first in range(0, arguments.samples, arguments.shard):
                for task in TASKS:
                    chosen = [s for s in readings(task, arguments.heads) if (s.strategy == "minference") is last]
                    chosen = [s for s in chosen if re.search(arguments.only, described(task, length, s))]
                    # Few readings per unit, so that the processes finish together.
                    for start in range(0, len(chosen), 5):
                        count = min(arguments.shard, arguments.samples - first)
                        yield Unit(task, length, tuple(chosen[start : start + 5]), FIRST_SEED, first, count)


def described(task: str, length: int, setting: Setting) -> str:
    """The text that ``--only`` is matched against."""
    return (
        f"{task} {length} {setting.strategy} {setting.method.blocks} {setting.compressor and setting.compressor.name}"
    )


def timed(model: str, device: str, heads: str | None) -> Iterator[Record]:
    """Yield answers of this single process by every reading except the ablations of passing."""
    engines.start(model, device)
    chosen = tuple(readings("multikey", heads))
    for length in LENGTHS:
        answer(Unit("multikey", length, chosen, FIRST_SEED, 0, 1), 1)
        yield from answer(Unit("multikey", length, chosen, FIRST_SEED, 0, TIMED), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--heads", help="file of retaining heads; those that ship with the model, if it has some")
    parser.add_argument("--samples", type=int, default=102)
    parser.add_argument("--only", default="", help="regular expression on 'task length strategy blocks compressor'")
    parser.add_argument("--no-speeds", action="store_true", help="time nothing: the device differs from the rest's")
    parser.add_argument("--shard", type=int, default=17, help="samples of a unit")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no unit after that time")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    arguments = parser.parse_args()

    from apb.evaluation.records import Store, write_records
    from apb.hf.loading import pick_device, shipped_model

    began = time.perf_counter()
    model, device = str(arguments.model or shipped_model()), pick_device(None).type
    shipped = Path(model) / "heads.safetensors"
    if arguments.heads is None and shipped.is_file():
        arguments.heads = str(shipped)
    store = Store(arguments.out)
    missing = remaining(units(arguments), store)
    speeds: list[Record] = []
    if not arguments.no_speeds:
        # This also fills the compilers' disk caches for the other processes.
        speeds = list(timed(model, "cuda:0" if device == "cuda" else "cpu", arguments.heads))
        print(f"{time.perf_counter() - began:.0f} s: speeds", flush=True)
    left = run(model, missing, arguments.jobs, began + arguments.seconds, store.add)
    if left:
        print(f"Out of time with {left} units left: run the command again to continue.", flush=True)
    whole = sorted(store, key=lambda r: (r.length, TASKS.index(r.task), r.sample, r.reading_name))
    write_records(arguments.out.with_suffix(".jsonl.gz"), [*whole, *speeds])
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
