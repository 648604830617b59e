"""``apb train``: training of retaining heads and of the model that comes with the package."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, at_least
from . import options

if TYPE_CHECKING:
    from ..training.heads.train import Report

app = typer.Typer(help="Train retaining heads, or the model that comes with apb.")


@app.callback()
def _group() -> None:
    """Train retaining heads, or the model that comes with apb."""


@app.command()
def needle(
    out: Annotated[
        str,
        typer.Option(
            help="Folder for checkpoints, the log and the final model.", metavar="PATH", callback=options.folder_named
        ),
    ],
    minutes: Annotated[float, typer.Option(help="Time to train; all schedules are shares of it.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    init: Annotated[Path | None, typer.Option(help="Folder of a saved model to go on from.")] = None,
    device: options.Device = None,
) -> None:
    """Train the small model that ships with apb, on generated long-context tasks."""
    if not 0 < minutes < math.inf:
        raise InputError(f"The minutes to train must be a number above 0, not {minutes}.")
    if init is not None and not (init / "config.json").is_file():
        raise InputError(f"The folder {str(init)!r} holds no saved model to go on from.")

    from ..generation import check_seed
    from ..hf.loading import pick_device
    from ..training.needle.train import train_needle

    check_seed(seed)
    folder = Path(out)
    options.check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train_needle(folder, 60 * minutes, pick_device(device).type, seed, init)


@dataclass(frozen=True)
class HeadsRequest:
    """Everything a rank needs to train heads; plain values, so that it travels."""

    model: str
    data: str
    out: str
    settings: dict[str, Any]
    checkpoint_every: int
    dtype: str | None
    device: str


@app.command()
def heads(
    data: Annotated[
        Path, typer.Option(help="JSONL: objects of document, query and answer; of prompt and answer; or of messages.")
    ],
    out: Annotated[Path, typer.Option(help="File to write, heads.safetensors. While it trains OUT.checkpoint.")],
    model: options.ModelName = None,
    hidden: Annotated[int, typer.Option(help="Width of a head's hidden layer.")] = 1024,
    steps: Annotated[int, typer.Option(help="Updates; the samples are taken again when they run out.")] = 3000,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of an update, over all ranks; one a rank if left out.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a sample; longer ones lose their middle. 10240, or what the model can read."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises first and then falls to 0.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the samples' order.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    ranks: options.RankCount = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Train retaining heads for a model (Locret's recipe). A run that is killed resumes when started again."""
    from dataclasses import asdict

    from .quiet import quiet_libraries

    quiet_libraries()

    from ..distributed import launch
    from ..hf import loading, supported
    from ..training.heads.data import Samples
    from ..training.heads.train import Settings, check_positions, positions

    at_least("checkpoint every", checkpoint_every, 1)
    if out.suffix != ".safetensors":
        raise InputError(f"The heads are written as safetensors, and {str(out)!r} does not end in .safetensors.")
    options.check_out(out)
    place = loading.pick_device(device)
    size = launch.ranks_to_use(ranks, place)
    name = str(model or loading.shipped_model())
    config = loading.load_config(name)
    supported.check_supported(config)
    if max_length is None:
        max_length = min(10240, positions(config))
    settings = Settings(
        hidden=hidden,
        steps=steps,
        batch_size=size if batch_size is None else batch_size,
        max_length=max_length,
        learning_rate=learning_rate,
        seed=seed,
    )
    check_positions(config, settings)
    Samples(data, loading.load_tokenizer(name), max_length)
    request = HeadsRequest(name, str(data), str(out), asdict(settings), checkpoint_every, dtype, place.type)
    launch.run(train_heads, size, request)


def train_heads(request: HeadsRequest) -> None:
    """One rank's part; rank 0 reports."""
    from .quiet import quiet_libraries

    quiet_libraries()

    from ..distributed import launch
    from ..hf import loading
    from ..training.heads.data import Samples
    from ..training.heads.train import HeadTrainer, Settings

    device = launch.local_device(loading.pick_device(request.device))
    group = launch.join(device)
    model = loading.load_model(request.model, loading.pick_dtype(request.dtype, device), device)
    settings = Settings(**request.settings)
    samples = Samples(request.data, loading.load_tokenizer(request.model), settings.max_length)
    trainer = HeadTrainer(model, samples, request.out, settings, group)
    if group.rank == 0:
        trainer.run(_print, request.checkpoint_every)
    else:
        trainer.run(checkpoint_every=request.checkpoint_every)
    launch.leave()


def _print(report: Report) -> None:
    print(
        f"apb: step {report.step} of {report.steps}, {report.seconds:.0f} s: "
        f"loss {report.loss:.4f}, top-10 % overlap {report.overlap:.1%}",
        file=sys.stderr,
        flush=True,
    )
