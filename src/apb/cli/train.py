"""``apb train``: the models this package trains itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options

app = typer.Typer(help="Train the models that come with apb.")


@app.callback()
def _group() -> None:
    """Train the models that come with apb."""


@app.command()
def needle(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the log and the final model.")],
    minutes: Annotated[float, typer.Option(help="Time to train; all schedules are shares of it.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    init: Annotated[Path | None, typer.Option(help="Folder of a saved model to go on from.")] = None,
    device: options.Device = None,
) -> None:
    """Train the small model that ships with apb, on generated long-context tasks."""
    if minutes <= 0:
        raise InputError(f"The minutes to train must be above 0, not {minutes}.")
    if init is not None and not (init / "config.json").is_file():
        raise InputError(f"The folder {str(init)!r} holds no saved model to go on from.")

    from ..hf.loading import pick_device
    from ..training.needle.train import train_needle

    train_needle(out, 60 * minutes, pick_device(device).type, seed, init)
