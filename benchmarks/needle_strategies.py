"""What each strategy and compressor costs in accuracy on the shipped model: the table of its model card.

    python benchmarks/needle_strategies.py --jobs 16 --out benchmarks/results/needle_strategies.json

All settings of a task and length answer the same samples. The work is cut into shards of samples (one base seed each)
that run in parallel processes; on one GPU they share it. Prints the table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BLOCKS = 8
FIRST_SEED = 100
NEEDLES = ("single", "multikey")
NEED_EARLIER = ("headings", "variable_tracking")


def settings(task: str, length: int) -> dict[str, dict[str, Any]]:
    """Name of a row -> the engine's options."""
    block = length // BLOCKS
    rows: dict[str, dict[str, Any]] = {
        "full": {"strategy": "full"},
        "star": {"strategy": "star", "blocks": BLOCKS},
        "blocks alone": {"strategy": "star", "blocks": BLOCKS, "anchor_length": 0},
        "apb, query, l_p = block/8": {"strategy": "apb", "blocks": BLOCKS, "compressor": "query"},
    }
    apb = {"strategy": "apb", "blocks": BLOCKS}
    rows["apb, query, l_p = block/32"] = apb | {"compressor": "query", "passing_length": block // 32}
    if task in NEED_EARLIER:
        rows["apb, recent, l_p = block/8"] = apb | {"compressor": "recent"}
        rows["apb, random, l_p = block/8"] = apb | {"compressor": "random"}
        rows["apb, random, l_p = block/32"] = apb | {"compressor": "random", "passing_length": block // 32}
        rows["apb, nothing passed"] = apb | {"compressor": "query", "passing_length": 0}
    return rows


def shard(model: str, device: str, threads: int, task: str, length: int, count: int, seed: int) -> dict[str, float]:
    """Sum of scores of one shard of samples: name of a row -> sum."""
    import torch

    from apb.engine import Engine
    from apb.evaluation.synthetic import Setting, evaluate

    torch.set_num_threads(threads)
    engine = Engine.from_pretrained(model, device=device)
    rows = settings(task, length)
    chosen = [Setting(**options) for options in rows.values()]
    results = evaluate(engine, [task], [length], chosen, count, seed)
    return {name: result.score * count for name, result in zip(rows, results, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--tasks", nargs="+", default=[*NEEDLES, *NEED_EARLIER])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--shard", type=int, default=50, help="samples of a shard")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    import torch

    from apb.hardware import fingerprint
    from apb.hf.loading import pick_device, pick_dtype, shipped_model

    model = arguments.model or str(shipped_model())
    device = pick_device(None)
    shards = [
        (task, length, min(arguments.shard, arguments.samples - start), FIRST_SEED + start // arguments.shard)
        for start in range(0, arguments.samples, arguments.shard)
        for length in sorted(arguments.lengths, reverse=True)
        for task in sorted(arguments.tasks, key=lambda task: len(settings(task, 0)), reverse=True)
    ]
    sums: dict[tuple[str, int, str], float] = defaultdict(float)
    counts: dict[tuple[str, int], int] = defaultdict(int)
    started = time.perf_counter()
    threads = max(1, (torch.get_num_threads() if device.type == "cpu" else arguments.jobs) // arguments.jobs)

    def report() -> None:
        results = [
            {"task": task, "length": length, "setting": name, "samples": counts[task, length]}
            | {"score": total / counts[task, length], "options": settings(task, length)[name]}
            for (task, length, name), total in sorted(sums.items(), key=lambda item: item[0][:2])
        ]
        arguments.out.write_text(
            json.dumps(
                {
                    "command": "python " + " ".join(sys.argv),
                    "seeds": sorted({seed for *_, seed in shards}),
                    "fingerprint": fingerprint(device, pick_dtype(None, device)),
                    "seconds": time.perf_counter() - started,
                    "results": results,
                },
                indent=1,
            )
            + "\n"
        )

    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        gpus = max(1, torch.cuda.device_count())
        places = [f"cuda:{number % gpus}" if device.type == "cuda" else "cpu" for number in range(len(shards))]
        futures = {
            pool.submit(shard, model, place, threads, *work): work for place, work in zip(places, shards, strict=True)
        }
        for number, future in enumerate(as_completed(futures), 1):
            task, length, count, seed = futures[future]
            counts[task, length] += count
            for name, total in future.result().items():
                sums[task, length, name] += total
            report()  # after every shard, so that a run that is cut short keeps what it has
            print(
                f"{number}/{len(shards)} {time.perf_counter() - started:.0f} s {task} {length} seed {seed}", flush=True
            )
    names = list(dict.fromkeys(name for *_, name in sums))
    cells = sorted(counts)
    print("setting".ljust(30), *(f"{task[:9]} {length // 1024}K".rjust(14) for task, length in cells))
    for name in names:
        row = (f"{sums[*cell, name] / counts[cell]:.1f}" if (*cell, name) in sums else "" for cell in cells)
        print(name.ljust(30), *(value.rjust(14) for value in row))


if __name__ == "__main__":
    main()
