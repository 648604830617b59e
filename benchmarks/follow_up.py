"""How long a question waits for its first token: reading everything for it, or asking a document that stays read.

    python benchmarks/follow_up.py --length 32768 --out benchmarks/results/follow_up.json

For each strategy: seconds to read text and question anew, to read the document once, then from a question to its first
token over what is kept, and to write the document to disk and load it. Weights are those of --model, else the shipped
ones, or random ones of a --shape; texts are random tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import apb
from apb.hardware import fingerprint
from apb.hf.config import vocabulary
from apb.hf.loading import pick_device, pick_dtype, shipped_model
from apb.hf.random_weights import random_model, shape_config

QUESTION = 32
"""Tokens of a question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="of random weights, such as llama-3.1-8b")
    parser.add_argument("--model", help="folder or hub id of a checkpoint")
    parser.add_argument("--strategy", action="append", help="repeatable; full and apb if left out")
    parser.add_argument("--length", type=int, default=32768, help="tokens of document and question")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = pick_device(None)
    if arguments.shape:
        model = random_model(shape_config(arguments.shape), pick_dtype(None, device), device)
        warm = apb.Engine.from_model(model, strategy="full", allow_extrapolation=True)
    else:
        warm = apb.Engine.from_pretrained(arguments.model or shipped_model(), strategy="full")
    rows = []
    for strategy in arguments.strategy or ["full", "apb"]:
        with_strategy = apb.Engine.from_model(warm.model, strategy=strategy, allow_extrapolation=True)
        measure(with_strategy, arguments.length // 4, 2)  # kernels are compiled
        rows.append({"strategy": strategy, **measure(with_strategy, arguments.length, arguments.questions)})
        with_strategy.close()
    report = {
        "command": f"python {' '.join(sys.argv)}",
        "model": arguments.model or arguments.shape or "needle",
        "fingerprint": fingerprint(warm.device, warm.dtype),
        "length": arguments.length,
        "rows": rows,
    }
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(engine: apb.Engine, length: int, questions: int) -> dict[str, Any]:
    """The seconds of one strategy."""
    size = vocabulary(engine.model.config)
    draw = torch.randint(size, (length + QUESTION * questions,), generator=torch.Generator().manual_seed(0)).tolist()
    text, rest = draw[: length - QUESTION], draw[length - QUESTION :]
    asked = [rest[QUESTION * number : QUESTION * (number + 1)] for number in range(questions)]
    anew = engine.prefill(apb.Prompt.from_tokens([], text, asked[0])).timing["prefill_s"]
    document = engine.read(tokens=text)
    seconds = [first_token(document, question) for question in asked]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        document.save(folder)
        saved = time.perf_counter() - start
        size_on_disk = sum(path.stat().st_size for path in Path(folder).iterdir())
        start = time.perf_counter()
        loaded = engine.load(folder)
        loaded_s = time.perf_counter() - start
        from_disk = first_token(loaded, asked[0])
    return {
        "blocks": document.plan.blocks,
        "anew_s": anew,
        "read_s": document.state.prefill_s,
        "first_token_s": statistics.median(seconds),
        "first_token_all_s": seconds,
        "save_s": saved,
        "load_s": loaded_s,
        "first_token_after_load_s": from_disk,
        "bytes": size_on_disk,
    }


def first_token(document: apb.Document, question: list[int]) -> float:
    """Seconds from a question to its first token."""
    start = time.perf_counter()
    int(document.prefill(question).logits.argmax())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
