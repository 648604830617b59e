"""Options that several commands share, worded once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError


def _named(name: str | None) -> str | None:
    """A name as given; InputError for an empty one, which is a variable of the shell that was never set."""
    if name is not None and not name.strip():
        raise InputError("An empty name was given for the model; give one, or leave the option out.")
    return name


Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder or hub id. The small model that ships with apb if left out.", callback=_named),
]
RandomWeights = Annotated[
    str | None,
    typer.Option(help="A model shape with random weights instead, such as llama-3.1-8b.", callback=_named),
]
Strategy = Annotated[
    str,
    typer.Option(
        help="How the document is read: apb, star or minference (approximate), full, ring or ulysses, or auto."
    ),
]
Blocks = Annotated[int | None, typer.Option(help="Blocks the document is cut into.")]
Rounds = Annotated[
    int | None,
    typer.Option(help="Passes that the blocks are read in, which bounds memory. One if left out, or what fits."),
]
Ranks = Annotated[
    int | None, typer.Option(help="Processes to start on this machine. Under torchrun: those that are there.")
]
TensorParallel = Annotated[
    int, typer.Option(help="Processes that share the weights of one rank; there are that many times as many processes.")
]
GpusPerRank = Annotated[
    int, typer.Option(help="GPUs that the layers of one rank are split over, for models too large for one GPU.")
]
AnchorLength = Annotated[int | None, typer.Option(help="Tokens of the anchor; a quarter of a block if left out.")]
PassingLength = Annotated[
    int | None, typer.Option(help="Pairs a block passes on, per KV head; an eighth of a block if left out.")
]
Compressor = Annotated[
    str | None,
    typer.Option(
        help="What chooses them: query, query-edge, retaining, recent or random. By default query-edge, with --heads "
        "retaining."
    ),
]
Heads = Annotated[Path | None, typer.Option(help="File of trained retaining heads.")]
VerticalSize = Annotated[
    str | None, typer.Option(help="Columns that each head sees under minference: a number, or a share such as 0.1.")
]
SlashSize = Annotated[
    str | None, typer.Option(help="Diagonals that each head sees under minference: a number, or a share such as 0.1.")
]
Approximate = Annotated[bool, typer.Option("--approximate", help="Let --strategy auto choose one that is not exact.")]
AllowExtrapolation = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Go beyond the positions the model was trained for.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", help="One of the tokenizer's chat templates by name, or a file, instead of its own."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32. By default bfloat16 on a GPU, float32 on the CPU.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. By default a GPU where there is one.")]


def check_out(path: Path) -> None:
    """InputError where a file of that name cannot be written; to be said before anything runs for it."""
    if path.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: it is a folder; name a file.")
    if not path.parent.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{str(path)!r} cannot be written: no permission.")


def budget(option: str, text: str | None) -> int | float | None:
    """A number of tokens ("1000"), or a share of the prompt ("0.1", "10%"), as the plan takes them."""
    if text is None:
        return None
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise InputError(f"{option} takes a number such as 1000 or a share such as 0.1, not {text!r}.") from error


# Parameters of commands that answer, by what takes them.
_LOADING = ("dtype", "trust_remote_code", "tensor_parallel", "gpus_per_rank")
_SIZES = ("blocks", "rounds", "anchor_length", "passing_length")
_READING = ("strategy", *_SIZES, "compressor", "allow_extrapolation", "approximate")


def of_engine(given: dict[str, Any], device: str) -> dict[str, dict[str, Any]]:
    """What makes an engine of a command's parameters, plain values: ``loading`` and ``reading``."""
    reading = {name: given[name] for name in _READING}
    reading["heads"] = None if given["heads"] is None else str(given["heads"])
    for name in ("vertical_size", "slash_size"):
        reading[name] = budget("--" + name.replace("_", "-"), given[name])
    return {"loading": {name: given[name] for name in _LOADING} | {"device": device}, "reading": reading}
