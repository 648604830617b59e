"""`python -m apb.training.needle OUT SECONDS [DEVICE] [SEED] [INIT]`: train the small model."""

from __future__ import annotations

import sys
from pathlib import Path

from .train import train_needle

USAGE = "python -m apb.training.needle OUT SECONDS [DEVICE] [SEED] [INIT]"


def main(arguments: list[str]) -> None:
    """Train with positional arguments."""
    if not 2 <= len(arguments) <= 5:
        raise SystemExit(f"usage: {USAGE}")
    out, seconds, device, seed, init = (*arguments, *["", "", "", "", ""][len(arguments) :])
    train_needle(Path(out), float(seconds), device or "cuda", int(seed or 0), Path(init) if init else None)


if __name__ == "__main__":
    main(sys.argv[1:])
