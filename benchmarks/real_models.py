"""Every answer of public checkpoints, reading by reading: the records of the report on real models.

    python benchmarks/real_models.py --model FOLDER --length 4096 --length 32768 --jobs 6 --out real_models.jsonl

All readings answer the same samples of all generated kinds. A run that was stopped, by ``--seconds`` or otherwise,
goes on when the command is given again; when all is answered, ``apb report`` makes the tables.
``benchmarks/real_models.sh`` runs it for all checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import engines
from answering import Unit, answer, remaining, run
from candidates import Observers

from apb import Propagation
from apb.compressors import Compressor
from apb.decoding import Pages, Squeezed
from apb.evaluation.settings import Setting

SEED = 200
SETS = ("main", "ablations", "minference", "follow-ups", "bound", "propagation", "depths", "decode")
BLOCKS = (512, 1024, 2048, 4096)
"""Lengths of blocks, in tokens."""
ABLATED = 1024
"""The length of block at which compressors, passing lengths and anchor lengths are compared."""
FOLLOWED = 2048
"""The length of block at which questions are asked after reading, and of default plans."""
BOUND = 32
"""A block sees pairs of others for one of so many tokens of the text: of 131,072 tokens the best 4,096."""
EVERY_ROW = Observers(observers=1 << 20)
"""Each key is scored by all rows of its block, as if the text were repeated (KVzip, arXiv 2505.23416, without reading
it twice)."""
PROPAGATED = (0.05, 0.1, 0.2, 0.4)
"""Shares of the rows that go on from a layer."""
DEPTHS = ((1, 3), (1, 2), (7, 12), (3, 4))
"""Shares of the model's layers after which only they do, from the next layer on that sees the whole text."""
ATTENDED = (0.05, 0.1, 0.25)
"""Shares of the keys that a new token attends to."""
TIMED_TASK = "multikey"
TIMED = 3
# Readings that a process answers side by side: a unit is short, and the processes finish together.
SIDE_BY_SIDE = 4


def cut(
    strategy: str, length: int, block: int, compressor: str | Compressor | None = None, **options: object
) -> Setting:
    """A reading in blocks of about ``block`` tokens."""
    return Setting.of(strategy, compressor, blocks=max(2, round(length / block)), **options)


def main_readings(length: int) -> list[Setting]:
    """Both baselines, the strategies, and the lengths of blocks."""
    blocks = [block for block in BLOCKS if 2 * block <= length]
    found = [Setting.of("full"), Setting.of("full", question_first=True)]
    found += [cut("apb", length, block) for block in blocks]
    found += [cut("star", length, block) for block in blocks if block in (ABLATED, 4096)]
    found += [cut("star", length, ABLATED, question_first=True), cut("apb", length, ABLATED, question_first=True)]
    return found


def ablations(length: int, heads: str | None) -> list[Setting]:
    """What is passed on, how much of it, and anchors, at one length of block."""
    block = length // max(2, round(length / ABLATED))
    found = [cut("apb", length, ABLATED, name) for name in ("query", "recent", "random")]
    if heads is not None:
        found.append(cut("apb", length, ABLATED, "retaining", heads=heads))
    found += [cut("apb", length, ABLATED, passing_length=size) for size in (0, block // 16, block // 4, block // 2)]
    found += [cut("apb", length, ABLATED, anchor_length=size) for size in (block // 2, block)]
    return found


def bound(length: int) -> list[Setting]:
    """A block sees all pairs that others pass on, an eighth of their tokens, or the best so many of them."""
    return [cut("apb", length, FOLLOWED), cut("apb", length, FOLLOWED, passing_budget=length // BOUND)]


def follow_ups(length: int, heads: str | None) -> list[Setting]:
    """Questions asked after the document was read: for them, for another question, or for none."""
    block = length // max(2, round(length / FOLLOWED))
    eighth, half = block // 8, block // 2

    def blocks(when: str, compressor: str | Compressor | None = None, **options: object) -> Setting:
        return replace(cut("apb", length, FOLLOWED, compressor, **options), ask_after=when)

    found = [blocks("this"), blocks("other"), blocks("none", passing_length=eighth), blocks("typical")]
    found += [blocks(when, passing_length=half) for when in ("none", "typical")]
    found += [replace(each, ask_after="none") for each in (Setting.of("full"), cut("star", length, 4096))]
    for compressor in ("recent", "random", Observers(), EVERY_ROW):
        found.append(blocks("none", compressor, passing_length=half))
    found += [blocks("none", compressor, passing_length=eighth) for compressor in (Observers(), EVERY_ROW)]
    if heads is not None:
        found += [blocks("none", "retaining", heads=heads, passing_length=size) for size in (half, eighth)]
    return found


def propagations(length: int) -> list[Setting]:
    """The default's share and layer of propagation, beside all rows."""
    whole = cut("apb", length, FOLLOWED)
    return [whole, replace(whole, propagation=Propagation())]


def depths(length: int, reach: Sequence[int | None]) -> list[Setting]:
    """From which layer on how many of the rows go on, beside all rows: of ``apb``, and, from the middle on, of full
    attention with the question in front. ``reach``: see :meth:`apb.Propagation.settled`."""
    blocks, full = cut("apb", length, FOLLOWED), Setting.of("full", question_first=True)
    seeing = [index for index, window in enumerate(reach[:-1]) if window is None or window >= length]
    after = [len(reach) * part // parts for part, parts in DEPTHS]
    layers = sorted({next((layer for layer in seeing if layer >= least), seeing[-1]) for least in after})
    found = [blocks, *(replace(blocks, propagation=Propagation(at, share)) for at in layers for share in PROPAGATED)]
    middle = Propagation().settled(reach, length).layer
    return [*found, full, *(replace(full, propagation=Propagation(middle, share)) for share in PROPAGATED[1:3])]


def decodings() -> list[Setting]:
    """Every key attended to by new tokens, or a share of them, after the same exact reading."""
    shares = [kind(share) for kind in (Pages, Squeezed) for share in ATTENDED]
    return [Setting.of("full"), *(replace(Setting.of("full"), decoding=each) for each in shares)]


def units(arguments: argparse.Namespace) -> Iterator[Unit]:
    """All samples: of one set of readings and one length after the other, so that what is there can be reported."""
    from apb.evaluation.tasks import TASKS
    from apb.hf.counting import model_shape
    from apb.hf.loading import load_config

    shape = model_shape(load_config(arguments.model))
    reach = shape.reach or (None,) * shape.layers
    tasks = arguments.task or [task for task in TASKS if task != "qa"]
    for name in arguments.set:
        for length in arguments.length:
            sets = {
                "main": main_readings(length),
                "ablations": ablations(length, arguments.heads),
                "minference": [Setting.of("minference")],
                "follow-ups": follow_ups(length, arguments.heads),
                "bound": bound(length),
                "propagation": propagations(length),
                "depths": depths(length, reach),
                "decode": decodings(),
            }
            for first in range(0, arguments.samples, arguments.shard):
                count = min(arguments.shard, arguments.samples - first)
                for task in tasks:
                    beside = len(sets[name]) if name == "decode" else SIDE_BY_SIDE  # which share a reading
                    for start in range(0, len(sets[name]), beside):
                        chosen = tuple(sets[name][start : start + beside])
                        yield Unit(task, length, chosen, SEED, first, count)


def timed(arguments: argparse.Namespace, device: str, settings: list[Setting], length: int) -> None:
    """Append the answers of this process alone to a file of their own: their times measure speed."""
    from apb.evaluation.records import Store

    store = Store(arguments.speeds)
    unit = Unit(TIMED_TASK, length, tuple(settings), SEED, 0, TIMED)
    missing = remaining([unit], store)
    for left in missing:
        engines.start(arguments.model, device, fused=None)
        answer(replace(left, count=1), 1)  # kernels are compiled
        for record in answer(left, 1):
            store.add(record)
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--length", type=int, action="append", required=True, help="tokens of a sample; repeatable")
    parser.add_argument("--set", action="append", choices=SETS, help="all if left out")
    parser.add_argument("--task", action="append", help="all that need no file if left out")
    parser.add_argument("--heads", help="file of retaining heads")
    parser.add_argument("--quantization", help="fp8; its records belong into a file of their own")
    parser.add_argument("--samples", type=int, default=25, help="of each kind and length")
    parser.add_argument("--shard", type=int, default=5, help="samples of a unit")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1, help="answers that a job writes side by side")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no unit after that time")
    parser.add_argument("--speeds", type=Path, help="measure seconds of the main readings, and append them here")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    arguments = parser.parse_args()
    arguments.set = arguments.set or list(SETS)

    from apb.evaluation.records import Store
    from apb.hf.loading import pick_device

    began = time.perf_counter()
    if arguments.speeds is not None:
        device = "cuda:0" if pick_device(None).type == "cuda" else "cpu"
        for length in arguments.length:
            timed(arguments, device, [*main_readings(length), Setting.of("minference")], length)
        return
    store = Store(arguments.out)
    missing = remaining(units(arguments), store)
    until = began + arguments.seconds
    left = run(arguments.model, missing, arguments.jobs, until, store.add, arguments.quantization, arguments.batch_size)
    store.close()
    if left:
        print(f"Out of time with {left} units left: run the command again to continue.", flush=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
