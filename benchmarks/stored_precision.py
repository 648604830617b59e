"""What rounding a stored document's keys and values to 8 bits does to its answers.

    python benchmarks/stored_precision.py --length 8192 --samples 32 --out benchmarks/results/stored_precision.json
    python benchmarks/stored_precision.py --model PATH --length 2048 --samples 12

Each sample's text is read once, and its question asked over the keys and values as they are and over rounded ones:
float8 (e4m3) and int8, with a scale for each head and each page of 64 tokens. Printed for each kind and format: the
score and the mean difference with its 95 % interval (bootstrap), the share of answers that are the same text, and the
largest and mean difference of the logits after the question, beside their own spread.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import apb
from apb.evaluation.scoring import METRICS
from apb.evaluation.synthetic import items
from apb.hardware import fingerprint
from apb.hf.loading import shipped_model

PAGE = 64
DRAWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(shipped_model()))
    parser.add_argument("--task", action="append", help="repeatable; single and multikey if left out")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--strategy", default="apb")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engine = apb.Engine.from_pretrained(arguments.model, strategy=arguments.strategy, verify=False)
    tokenizer = engine.needed_tokenizer()
    report: dict[str, Any] = {
        "command": f"python {' '.join(sys.argv)}",
        "fingerprint": fingerprint(engine.device, engine.dtype),
        "cells": [],
    }
    for task in arguments.task or ["single", "multikey"]:
        found: dict[str, list[dict[str, Any]]] = {"as it is": [], "float8": [], "int8": []}
        for item in items(tokenizer, task, arguments.length, arguments.samples, 4711):
            for name, outcome in asked(engine, item).items():
                found[name].append(outcome)
            report["cells"] = [each for each in report["cells"] if each["task"] != task]
            report["cells"] += [cell(task, name, outcomes, found["as it is"]) for name, outcomes in found.items()]
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def asked(engine: apb.Engine, item: Any) -> dict[str, dict[str, Any]]:
    """By format: the answer, its score, and the logits after the question."""
    prompt = item.prompt(engine.tokenizer)
    document = engine.read(tokens=prompt.document, prefix=prompt.prefix)
    document.rest()  # what was asked is not rounded
    cache = document.state.cache
    exact = [[part.transpose(0, 1).clone() for part in cache.shard(layer)] for layer in cache.indices]
    outcomes = {}
    for name, change in (("as it is", lambda x: x), ("float8", float8), ("int8", int8)):
        document.rest()
        for layer, pair in zip(cache.indices, exact, strict=True):
            for part, whole in zip(cache.shard(layer), pair, strict=True):
                part.copy_(change(whole).transpose(0, 1))
        logits = document.prefill(prompt.query).logits.clone()
        text = document.ask(prompt.query, max_new_tokens=min(item.max_new_tokens, 24)).text
        outcomes[name] = {"text": text, "score": METRICS[item.metric](text, item.answers), "logits": logits}
    return outcomes


def paged(x: Tensor) -> tuple[Tensor, Tensor]:
    """(heads, tokens, head_dim) by pages, (heads, pages, page, head_dim), and the largest value of each."""
    pages = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % PAGE)).unflatten(1, (-1, PAGE))
    return pages, pages.abs().amax((-1, -2), keepdim=True).clamp(min=1e-30)


def float8(x: Tensor) -> Tensor:
    """Rounded to e4m3, of which 448 is the largest."""
    pages, most = paged(x)
    rounded = (pages * (448 / most)).to(torch.float8_e4m3fn).to(x.dtype)
    return (rounded * (most / 448)).flatten(1, 2)[:, : x.shape[1]]


def int8(x: Tensor) -> Tensor:
    """Rounded to 255 equal steps."""
    pages, most = paged(x)
    return ((pages * (127 / most)).round() * (most / 127)).flatten(1, 2)[:, : x.shape[1]]


def cell(task: str, name: str, outcomes: list[dict[str, Any]], exact: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one kind and format."""
    pairs = list(zip(outcomes, exact, strict=True))
    lost = [one["score"] - other["score"] for one, other in pairs]
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(lost, k=len(lost))) for _ in range(DRAWS))
    apart = [(one["logits"] - other["logits"]).abs() for one, other in pairs]
    return {
        "task": task,
        "format": name,
        "samples": len(outcomes),
        "score": fmean(one["score"] for one in outcomes),
        "difference": fmean(lost),
        "interval": [means[DRAWS // 40], means[-DRAWS // 40 - 1]],
        "same_answers": fmean(one["text"] == other["text"] for one, other in pairs),
        "same_first_token": fmean(bool(one["logits"].argmax() == other["logits"].argmax()) for one, other in pairs),
        "logits_largest_difference": max(float(each.max()) for each in apart),
        "logits_mean_difference": fmean(float(each.mean()) for each in apart),
        "logits_spread": fmean(float(other["logits"].std()) for _, other in pairs),
    }


if __name__ == "__main__":
    main()
