"""Parameters that several commands share, declared once: by themselves, or in groups that a command takes as one.

Options of strategies and compressors are not written down here: they come from the dataclass fields that declare them
(:func:`apb.planning.options.option`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..compressors import COMPRESSORS
from ..compressors import OPTIONS as COMPRESSOR_OPTIONS
from ..decoding import DECODINGS, make_decodings
from ..decoding import OPTIONS as DECODING_OPTIONS
from ..decoding import Decoding as DecodeMethod
from ..errors import InputError, at_least
from ..planning.methods import METHODS
from ..planning.methods import OPTIONS as METHOD_OPTIONS
from ..planning.propagation import Propagation
from .groups import Derived


def named(name: str | None) -> str | None:
    """The name unchanged; InputError if it is empty, as from an unset shell variable."""
    if name is not None and not name.strip():
        raise InputError("An empty name was given for the model; give one, or leave the option out.")
    return name


def check_out(path: Path) -> None:
    """InputError if a file of that name cannot be written; checked before anything runs."""
    if path.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: it is a folder; name a file.")
    if not path.parent.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{str(path)!r} cannot be written: no permission.")


def folder_named(path: str) -> str:
    """The path unchanged; InputError if it is empty, which would be the current folder."""
    if not path.strip():
        raise InputError("An empty name was given for the folder; name it, or give . for the current one.")
    return path


def check_folder(path: Path) -> None:
    """InputError if files cannot be written to a folder, which may have to be made; checked before anything runs."""
    there = path if path.exists() else next(each for each in path.absolute().parents if each.exists())
    if not there.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: {str(there)!r} is a file; name a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{str(path)!r} cannot be written: no permission in {str(there)!r}.")


def typed() -> str:
    """The command as it was typed, which files of results name."""
    return " ".join(["apb", *sys.argv[1:]])


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


_STRATEGIES = (
    f"{_listed(name for name, kind in METHODS.items() if not kind.exact)} (approximate), "
    f"{_listed(name for name, kind in METHODS.items() if kind.exact)}"
)
_COMPRESSORS = f"What chooses the pairs that blocks pass on: {_listed(COMPRESSORS)}"
_DEFAULT_COMPRESSOR = "By default query-edge, with --heads retaining."

ModelName = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint folder, GGUF file or hub id. The small model that ships with apb if left out.", callback=named
    ),
]
RandomWeights = Annotated[
    str | None,
    typer.Option(help="A model shape with random weights instead, such as llama-3.1-8b.", callback=named),
]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32. By default bfloat16 on a GPU, float32 on the CPU.")
]
Quantization = Annotated[
    str | None, typer.Option(help="fp8: linear layers multiply in fp8, on GPUs that have it. Not exact.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. By default a GPU where there is one.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
RankCount = Annotated[
    int | None, typer.Option(help="Processes to start on this machine. Under torchrun: those that are there.")
]
TensorParallel = Annotated[
    int, typer.Option(help="Processes that share the weights of one rank; there are that many times as many processes.")
]
GpusPerRank = Annotated[
    int, typer.Option(help="GPUs that the layers of one rank are split over, for models too large for one GPU.")
]
Strategy = Annotated[str, typer.Option(help=f"How the document is read: {_STRATEGIES}, or auto.")]
Strategies = Annotated[list[str] | None, typer.Option(help=f"{_STRATEGIES}; repeatable. By default apb.")]
Compressor = Annotated[str | None, typer.Option(help=f"{_COMPRESSORS}. {_DEFAULT_COMPRESSOR}")]
Compressors = Annotated[list[str] | None, typer.Option(help=f"{_COMPRESSORS}; repeatable. {_DEFAULT_COMPRESSOR}")]
_DECODE = f"How new tokens attend to the cache: {_listed(DECODINGS)}"
DecodeName = Annotated[str, typer.Option("--decode", help=f"{_DECODE}.")]
DecodeNames = Annotated[
    list[str] | None, typer.Option("--decode", help=f"{_DECODE}; repeatable, over one reading. By default exact.")
]
Rounds = Annotated[
    int | None,
    typer.Option(help="Passes that the blocks are read in, which bounds memory. One if left out, or what fits."),
]
_PROPAGATE = (
    "Let only this share of the document's rows, those that the question looks at, go on above a layer; auto is 0.2, "
    "from the middle layer"
)
_PROPAGATED = "SHARE[@LAYER]|auto|off"
Propagate = Annotated[str, typer.Option("--propagate", metavar=_PROPAGATED, help=f"{_PROPAGATE}.")]
Propagations = Annotated[
    list[str] | None, typer.Option("--propagate", metavar=_PROPAGATED, help=f"{_PROPAGATE}; repeatable.")
]
Document = Annotated[str, typer.Option(help="Text file to read, or - for standard input.")]
Query = Annotated[str, typer.Option(help="The question.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", help="One of the tokenizer's chat templates by name, or a file, instead of its own."
    ),
]
AllowExtrapolation = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Go beyond the positions the model was trained for.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def propagations(given: list[str] | None) -> tuple[Propagation | None, ...]:
    """What a repeatable ``--propagate`` asks for; one that is off if it was not given."""
    return tuple(map(Propagation.parsed, given or ["off"]))


@dataclass(frozen=True)
class Model:
    """A checkpoint, its dtype and its kind of device."""

    model: ModelName = None
    dtype: Dtype = None
    device: Device = None
    quantization: Quantization = None

    def __post_init__(self) -> None:
        """InputError if it is not there, before a command imports torch, which takes seconds."""
        from ..hf.hub import check_there

        if self.model is not None:
            check_there(self.model)

    @property
    def name(self) -> str:
        """Folder or hub id."""
        from ..hf.loading import shipped_model

        return str(self.model or shipped_model())

    def config(self) -> Any:
        """Its configuration; InputError if there is none."""
        from ..hf.loading import load_config

        return load_config(self.name)


@dataclass(frozen=True)
class RemoteModel(Model):
    """A checkpoint that may come with its own code."""

    trust_remote_code: TrustRemoteCode = False

    def config(self) -> Any:
        """See :meth:`Model.config`."""
        from ..hf.loading import load_config

        return load_config(self.name, self.trust_remote_code)


@dataclass(frozen=True)
class Ranks:
    """The processes and GPUs that read together."""

    ranks: RankCount = None
    tensor_parallel: TensorParallel = 1
    gpus_per_rank: GpusPerRank = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """The compressor, and the options of strategies and compressors, for every command that reads a prompt."""

    method: Annotated[dict[str, Any], Derived(METHOD_OPTIONS)]
    compressor: Compressor = None
    scoring: Annotated[dict[str, Any], Derived(COMPRESSOR_OPTIONS)]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The decode method and its options."""

    decoding: DecodeName = "exact"
    options: Annotated[dict[str, Any], Derived(DECODING_OPTIONS)]


@dataclass(frozen=True, kw_only=True)
class Decodings:
    """Decode methods beside each other, over the same reading, and their options."""

    decoding: DecodeNames = None
    options: Annotated[dict[str, Any], Derived(DECODING_OPTIONS, repeatable=("share",))]

    def made(self) -> list[DecodeMethod]:
        """The methods; the exact one if none was named."""
        return make_decodings(self.decoding or ["exact"], self.options)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The reading of one prompt; its ``values`` are arguments of :meth:`apb.reading.Reading.of`.

    A new parameter is a new field. A choice with options of its own, such as the compressor, is followed by a field
    marked as :class:`Derived` from their table.
    """

    strategy: Strategy = "apb"
    options: Options
    decode: Decoding
    rounds: Rounds = None
    propagation: Propagate = "off"
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Let --strategy auto choose one that is not exact.")
    ] = False
    allow_extrapolation: AllowExtrapolation = False


@dataclass(frozen=True, kw_only=True)
class Readings:
    """The readings that an evaluation compares: all combinations of repeated options."""

    strategy: Strategies = None
    method: Annotated[dict[str, Any], Derived(METHOD_OPTIONS, repeatable=("blocks",))]
    compressor: Compressors = None
    scoring: Annotated[dict[str, Any], Derived(COMPRESSOR_OPTIONS)]
    propagation: Propagations = None
    decode: Decodings

    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`apb.evaluation.settings.settings`."""
        names = {"strategies": self.strategy or ["apb"], "compressors": self.compressor or []}
        return {
            **names,
            "decodings": self.decode.made(),
            "propagations": propagations(self.propagation),
            **self.method,
            **self.scoring,
        }


@dataclass(frozen=True)
class Sampling:
    """Sampling of the answer; its ``values`` are arguments of :class:`apb.generation.Sampling`."""

    max_new_tokens: MaxNewTokens = 64
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0
    top_k: Annotated[int | None, typer.Option(help="With a temperature: draw from the k likeliest tokens.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="With a temperature: draw from the likeliest tokens that together hold p.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Of the draws: the same seed gives the same text.")] = None

    def __post_init__(self) -> None:
        """InputError in the words of the command line for what :class:`apb.generation.Sampling` would refuse in its."""
        at_least("--max-new-tokens", self.max_new_tokens, 1)
        if self.top_k is not None:
            at_least("--top-k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, not {self.top_p}.")
        for name in ("top_k", "top_p", "seed"):
            if getattr(self, name) is not None and not self.temperature:
                raise InputError(
                    f"--{name.replace('_', '-')} goes with a --temperature above 0: give one, or leave it out."
                )
