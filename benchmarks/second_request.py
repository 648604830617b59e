"""How long a request waits for its first decoded token, on an engine that has answered others or none before.

    python benchmarks/second_request.py --length 32768 --other 65536 --out benchmarks/results/second_request.json

Seconds from the end of prefill to the token that the first decode step gives, for several requests of one engine: the
first of the process compiles kernels, and a graph is captured where there is none that serves. Beside them the median
of the steps that follow, and what the bare graph takes, replayed in a loop. Without --model weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import apb
from apb.hardware import fingerprint
from apb.hf.config import vocabulary
from apb.hf.loading import pick_device, pick_dtype
from apb.hf.random_weights import random_model, shape_config

REPLAYS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="of the random weights")
    parser.add_argument("--model", help="folder or hub id of a checkpoint, in place of random weights")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the prompts")
    parser.add_argument("--other", type=int, default=65536, help="tokens of the last request's prompt")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a request")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = pick_device(None)
    dtype = pick_dtype(None, device)
    options: dict[str, Any] = {"strategy": "apb", "allow_extrapolation": True}
    if arguments.model:
        warm = apb.Engine.from_pretrained(arguments.model, **options)
    else:
        warm = apb.Engine.from_model(random_model(shape_config(arguments.shape), dtype, device), **options)
    with captured() as graphs:
        rows = [{"request": "first of the process", **ask(warm, arguments.length, arguments.tokens, graphs)}]
        # Of the same model: what is compiled is compiled.
        engine = apb.Engine.from_model(warm.model, **options)
        requests = (
            ("first of the engine", arguments.length),
            ("second of the same length", arguments.length),
            ("third of another length", arguments.other),
        )
        for name, length in requests:
            rows.append({"request": name, **ask(engine, length, arguments.tokens, graphs)})
    report = {
        "command": f"python {' '.join(sys.argv)}",
        "model": arguments.model or arguments.shape,
        "fingerprint": fingerprint(engine.device, engine.dtype),
        "tokens": arguments.tokens,
        "rows": rows,
    }
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


@contextmanager
def captured() -> Iterator[list[torch.cuda.CUDAGraph]]:
    """The CUDA graphs that are captured within it, in order."""
    graphs: list[torch.cuda.CUDAGraph] = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def noted(graph: torch.cuda.CUDAGraph, *args: Any, **options: Any) -> None:
        graphs.append(graph)
        begin(graph, *args, **options)

    with patch.object(torch.cuda.CUDAGraph, "capture_begin", noted):
        yield graphs


def ask(engine: apb.Engine, length: int, tokens: int, graphs: list[torch.cuda.CUDAGraph]) -> dict[str, Any]:
    """One request: what it waited for, and what its graph takes while its cache is there."""
    before = len(graphs)
    drawn = torch.randint(
        vocabulary(engine.model.config), (length,), generator=torch.Generator().manual_seed(before)
    ).tolist()
    session = engine.prefill(apb.Prompt.from_tokens([], drawn[:-16], drawn[-16:]), max_new_tokens=tokens)
    steps = []
    for _ in range(tokens):
        start = seconds(engine.device)
        session.extend([int(session.logits.argmax())])
        int(session.logits.argmax())
        steps.append(seconds(engine.device) - start)
    replay = None
    if session.captured:
        start = seconds(engine.device)
        for _ in range(REPLAYS):  # of one step: it writes the same slot again and again
            graphs[-1].replay()
        replay = (seconds(engine.device) - start) / REPLAYS
    return {
        "length": length,
        "prefill_s": session.timing["prefill_s"],
        "first_token_s": steps[0],
        "token_s": statistics.median(steps[1:]),
        "replay_s": replay,
        "graphs_captured": len(graphs) - before,
    }


def seconds(device: torch.device) -> float:
    """The time when all work that was queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
