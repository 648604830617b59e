"""How far the logits after a prompt are from those in bf16 if linear layers multiply in fp8.

    python benchmarks/float8_logits.py --model PATH --length 16384 --out benchmarks/results/float8_logits_h200.json

Prompts of all generated kinds, read by full attention. For each: the Kullback-Leibler divergence, in nats, from the
distribution of the next token in bf16 to that in fp8; the largest and the mean difference of the logits, beside their
own spread; and whether the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

import apb
from apb.evaluation.synthetic import items
from apb.evaluation.tasks import TASKS
from apb.hardware import fingerprint

SEED = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=2, help="of each kind")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str | None, dict[str, list[Tensor]]] = {}
    for quantization in (None, "fp8"):
        engine = apb.Engine.from_pretrained(
            given.model, dtype="bfloat16", strategy="full", quantization=quantization, verify=False
        )
        found[quantization] = after_prompts(engine, given.length, given.samples)
        device = engine.device
        engine.close()
        del engine
    exact, rounded = found[None], found["fp8"]
    kinds = {task: [apart(*pair) for pair in zip(exact[task], rounded[task], strict=True)] for task in exact}
    every = [each for measured in kinds.values() for each in measured]
    report = {
        "command": f"python {' '.join(sys.argv)}",
        "fingerprint": fingerprint(device, torch.bfloat16),
        "model": Path(given.model).name,
        "length": given.length,
        "prompts": len(every),
        "nats_median": median(each["nats"] for each in every),
        "nats_most": max(each["nats"] for each in every),
        "same_token": fmean(each["same_token"] for each in every),
        "largest_difference": max(each["largest_difference"] for each in every),
        **{name: fmean(each[name] for each in every) for name in ("nats", "mean_difference", "spread")},
        "kinds": kinds,
    }
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name != "kinds"}, indent=1))


def after_prompts(engine: apb.Engine, length: int, samples: int) -> dict[str, list[Tensor]]:
    """By kind the logits after each of its prompts, (vocab,) fp32."""
    tokenizer = engine.needed_tokenizer()
    return {
        task: [
            engine.prefill(item.prompt(tokenizer)).logits.float().cpu()
            for item in items(tokenizer, task, length, samples, SEED)
        ]
        for task in TASKS
        if task != "qa"
    }


def apart(exact: Tensor, rounded: Tensor) -> dict[str, Any]:
    """The figures of one prompt."""
    log_exact, log_rounded = exact.double().log_softmax(-1), rounded.double().log_softmax(-1)
    difference = (exact - rounded).abs()
    return {
        "nats": float((log_exact.exp() * (log_exact - log_rounded)).sum()),
        "same_token": bool(exact.argmax() == rounded.argmax()),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "spread": float(exact.std()),
    }


if __name__ == "__main__":
    main()
