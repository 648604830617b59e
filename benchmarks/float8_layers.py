"""Linear layers of the 8B shape in bf16 and in fp8: this package's, and torchao's where it is installed.

    python benchmarks/float8_layers.py --out float8_layers.json

Prints and writes, for each layer and number of rows, seconds a call, sustained, and the error beside fp64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apb.benchmarks.ceilings import sustained_seconds
from apb.hardware import fingerprint
from apb.hf.float8 import Float8Linear
from apb.hf.loading import pick_device

LAYERS = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "gate_proj": (4096, 14336), "down_proj": (14336, 4096)}


def kinds(layer: nn.Linear) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The ways to multiply, by name."""
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"bf16": layer, "fp8": Float8Linear.rounded(layer)}
    if find_spec("torchao") is not None:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        theirs = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False))
        theirs[0].weight = nn.Parameter(layer.weight.detach().clone())
        quantize_(theirs, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        found |= {"torchao": theirs, "torchao, compiled": torch.compile(theirs)}
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="by default 1 and 16384")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = pick_device(None)
    rows: list[dict[str, Any]] = []
    report = {
        "command": " ".join(["python", *sys.argv]),
        "fingerprint": fingerprint(device, torch.bfloat16),
        "torchao": None if find_spec("torchao") is None else __import__("torchao").__version__,
        "rows": rows,
    }
    for name, (width, outputs) in LAYERS.items():
        layer = nn.Linear(width, outputs, bias=False, device=device, dtype=torch.bfloat16)
        ways = kinds(layer)
        for count in arguments.rows or (1, 16384):
            x = torch.randn(count, width, device=device, dtype=torch.bfloat16)
            exact = x[:256].double() @ layer.weight.double().T
            for kind, multiply in ways.items():
                try:
                    error = float((multiply(x)[:256].double() - exact).norm() / exact.norm())
                    seconds = sustained_seconds(lambda: multiply(x), device)  # noqa: B023  # called here
                except Exception as problem:  # of another library: the others are still of interest
                    print(f"{name} {count} {kind}: {problem}", flush=True)
                    continue
                rate = 2 * count * width * outputs / seconds
                rows.append(
                    {"layer": name, "rows": count, "kind": kind, "seconds": seconds, "flops": rate, "error": error}
                )
                print(
                    f"{name} {count} {kind}: {seconds * 1e6:.1f} us, {rate / 1e12:.0f} TFLOP/s, error {error:.2e}",
                    flush=True,
                )
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
