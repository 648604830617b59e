"""From the command to the first token: with nothing compiled on disk, and with what a process before has left there.

    python benchmarks/start.py --shape llama-3.1-8b --length 32768 --other 24000 --out start.json

Each process of its own: imports, weights, then three requests of one engine (the first, one of another length, one more
of the first length) with seconds to the first token, and how many kernels and graphs each compiled: new folders in the
caches of Triton and of torch.compile. Weights are random ones of --shape, or those of --model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def compiled() -> int:
    """Folders in the caches, one for each thing that was compiled."""
    return sum(1 for name in CACHES for path in Path(os.environ[name]).rglob("*") if path.is_dir())


def process(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one process waits for."""
    began = time.perf_counter()
    import torch

    import apb
    from apb.hardware import fingerprint
    from apb.hf.config import vocabulary
    from apb.hf.loading import pick_device, pick_dtype
    from apb.hf.random_weights import random_model, shape_config

    imported = time.perf_counter()
    device = pick_device(None)
    options: dict[str, Any] = {"strategy": arguments.strategy, "allow_extrapolation": True}
    if arguments.model:
        engine = apb.Engine.from_pretrained(arguments.model, **options)
    else:
        model = random_model(shape_config(arguments.shape), pick_dtype(None, device), device)
        engine = apb.Engine.from_model(model, **options)
    loaded = time.perf_counter()
    requests = []
    for length in (arguments.length, arguments.other, arguments.length):
        before, start = compiled(), time.perf_counter()
        drawn = torch.randint(
            vocabulary(engine.model.config), (length,), generator=torch.Generator().manual_seed(length)
        )
        ids = drawn.tolist()
        session = engine.prefill(apb.Prompt.from_tokens([], ids[:-16], ids[-16:]), max_new_tokens=8)
        first = time.perf_counter() - start
        session.extend([int(session.logits.argmax())])
        int(session.logits.argmax())
        second = time.perf_counter() - start - first
        requests.append(
            {"length": length, "first_token_s": first, "second_token_s": second, "compiled": compiled() - before}
        )
    return {
        "imports_s": imported - began,
        "weights_s": loaded - imported,
        "requests": requests,
        "fingerprint": fingerprint(engine.device, engine.dtype),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="of random weights")
    parser.add_argument("--model", help="folder or hub id of a checkpoint")
    parser.add_argument("--strategy", default="apb")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--other", type=int, default=24000, help="tokens of the second request")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(process(arguments)))
        return
    report: dict[str, Any] = {"command": f"python {' '.join(sys.argv)}", "model": arguments.model or arguments.shape}
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder, part)) for name, part in CACHES.items()}
        for path in caches.values():
            Path(path).mkdir()
        for name in ("cold", "warm"):
            start = time.perf_counter()
            run = subprocess.run(
                [sys.executable, *sys.argv, "--child"], env=os.environ | caches, stdout=subprocess.PIPE, check=True
            )
            report[name] = {"process_s": time.perf_counter() - start, **json.loads(run.stdout.splitlines()[-1])}
            print(json.dumps({name: report[name]}, indent=1), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
