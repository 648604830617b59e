"""``apb bench``: speed compared with a baseline and the floor."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..compressors import Compressor
from ..errors import InputError, at_least
from . import options
from .bench_ranks import run
from .bench_tables import attention_line, print_attention
from .groups import expanded, values

if TYPE_CHECKING:
    from .checks import Place

app = typer.Typer(help="Measure speed, compared with a baseline of the same run and the floor.")


@app.callback()
def _group() -> None:
    """Measure speed, compared with a baseline of the same run and the floor."""


Out = Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")]
PlottedOut = Annotated[
    Path | None, typer.Option(help="Also write the figures there, as JSON, and plots beside it (apb-llm[report]).")
]


@dataclass(frozen=True)
class Subject(options.Model):
    """A checkpoint, or a shape with random weights."""

    random_weights: options.RandomWeights = None
    layers: Annotated[int | None, typer.Option(help="With random weights: only so many layers.")] = None

    def config(self) -> Any:
        """See :meth:`apb.cli.options.Model.config`."""
        from ..hf.random_weights import config_of

        if self.layers is not None and not self.random_weights:
            raise InputError("--layers goes with --random-weights: a checkpoint's model is run with all of its layers.")
        return config_of(self.model, self.random_weights, self.layers)


@dataclass(frozen=True)
class Common:
    """Parameters of both benchmarks of a model."""

    length: Annotated[list[int], typer.Option(help="Tokens of the prompt; repeatable.")]
    subject: Subject


@dataclass(frozen=True)
class Request:
    """Everything a rank needs; plain values, so that it travels."""

    what: str
    subject: Subject
    tensor_parallel: int
    lengths: list[int]
    options: dict[str, Any]
    out: str | None
    as_json: bool
    command: str


@app.command()
@expanded
def prefill(
    *,
    common: Common,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategies, the baseline first; repeatable. By default full and apb.")
    ] = None,
    chosen: options.Options,
    rounds: options.Rounds = None,
    propagation: options.Propagations = None,
    ranks: options.RankCount = None,
    tensor_parallel: options.TensorParallel = 1,
    repeat: Annotated[int, typer.Option(help="Counted repeats; the median is reported.")] = 3,
    max_seconds: Annotated[
        float | None, typer.Option(help="Leave out what takes longer, for each strategy and length in all.")
    ] = None,
    baseline_backend: Annotated[
        str, typer.Option(help="Attention of the first strategy: torch for the kernels that torch brings.")
    ] = "auto",
    out: PlottedOut = None,
    as_json: options.AsJson = False,
) -> None:
    """Prefill by several strategies and lengths: seconds, tokens per second, share of the floor, peak memory."""
    from ..compressors import make_compressor
    from ..planning.methods import make_method
    from .checks import check_used

    at_least("repeat", repeat, 1)
    names = strategy or ["full", "apb"]
    check_used(names, chosen, rounds, compared=True)
    for name in names:
        make_method(name, chosen.method, compared=True)
    compressor = make_compressor(chosen.compressor, chosen.scoring)
    limit = math.inf if max_seconds is None else max_seconds
    if not limit > 0:
        raise InputError(f"--max-seconds takes a number above 0, not {limit:g}.")

    from ..kernels.attention import BACKENDS

    if baseline_backend not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise InputError(f"Unknown attention back-end {baseline_backend!r}; choose one of {known}.")
    asked = {
        "strategies": names,
        "repeat": repeat,
        "max_seconds": limit,
        "baseline_backend": baseline_backend,
        "compressor": compressor,
        "rounds": rounds,
        "propagations": options.propagations(propagation),
        **chosen.method,
    }
    _launch("prefill", common, options.Ranks(ranks, tensor_parallel), asked, compressor, out, as_json)


@app.command()
@expanded
def decode(
    *,
    common: Common,
    strategy: options.Strategy = "apb",
    chosen: options.Options,
    decoding: options.Decoding,
    propagation: options.Propagate = "off",
    ranks: options.RankCount = None,
    tensor_parallel: options.TensorParallel = 1,
    tokens: Annotated[int, typer.Option(help="Counted tokens; the median is reported.")] = 32,
    sessions: Annotated[
        list[int] | None,
        typer.Option(help="Texts that are decoded at once, in turns and in one pass; repeatable. By default 1."),
    ] = None,
    out: Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Decode after long prompts: seconds a token, with and without CUDA graphs, beside the limit of memory."""
    from ..reading import Reading
    from .checks import check_used

    at_least("tokens", tokens, 1)
    for count in sessions or ():
        at_least("sessions", count, 1)
    check_used([strategy], chosen)
    how = {"strategy": strategy, **values(chosen), **values(decoding), "propagation": propagation}
    reading = Reading.of(**how, allow_extrapolation=True)
    asked = {"tokens": tokens, "sessions": sessions or [1], **how}

    def fits(place: Place) -> None:
        from ..benchmarks.decode import check_room
        from ..hardware import Hardware

        hardware = Hardware.of(place.device, place.dtype, place.processes)
        for length in common.length:
            shared = place.ranks, place.tensor_parallel
            check_room(reading, place.config, hardware, length, max(asked["sessions"]), tokens, *shared)

    _launch("decode", common, options.Ranks(ranks, tensor_parallel), asked, reading.compressor, out, as_json, fits)


def _launch(
    what: str,
    common: Common,
    ranks: options.Ranks,
    asked: dict[str, Any],
    compressor: Compressor,
    out: Path | None,
    as_json: bool,
    fits: Callable[[Place], None] = lambda place: None,
) -> None:
    from ..benchmarks.prefill import QUERY_TOKENS
    from ..distributed import launch
    from .checks import check

    for length in common.length:
        at_least("length", length, QUERY_TOKENS + 1)
    if out is not None:
        options.check_out(out)
    # The strategies' requirements are not checked here: those that cannot read the model are skipped with a note.
    place = check(common.subject, ranks, compressors=[compressor])
    fits(place)
    request = Request(
        what=what,
        subject=replace(common.subject, device=place.device.type),
        tensor_parallel=place.tensor_parallel,
        lengths=common.length,
        options=asked,
        out=None if out is None else str(out),
        as_json=as_json,
        command=options.typed(),
    )
    launch.run(run, place.processes, request)


@app.command()
def attention(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="HEADS/KV_HEADS,HEAD_DIM,BLOCK,ANCHOR,PASSING; repeatable. By default those of known results."
        ),
    ] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Only these kernels, by name; repeatable.")] = None,
    repeat: Annotated[int, typer.Option(help="Counted repeats; the median is reported.")] = 7,
    dtype: options.Dtype = None,
    device: options.Device = None,
    out: Out = None,
    as_json: options.AsJson = False,
) -> None:
    """A block's attention over [anchor | passed pairs | itself]: every kernel that runs here, time and error."""
    from ..benchmarks import attention as benchmark
    from ..benchmarks.ceilings import copy_bandwidth
    from ..hardware import fingerprint
    from ..hf import loading

    at_least("repeat", repeat, 1)
    if out is not None:
        options.check_out(out)
    place = loading.pick_device(device)
    number = loading.pick_dtype(dtype, place)
    shapes = [benchmark.Shape.parse(text) for text in shape or ()]
    shapes = shapes or (benchmark.GPU_SHAPES if place.type == "cuda" else benchmark.CPU_SHAPES)
    report: dict[str, Any] = {
        "command": options.typed(),
        "fingerprint": fingerprint(place, number),
        "copy_bandwidth": copy_bandwidth(place),
        "rows": [],
    }
    for row in benchmark.bench_attention(shapes, place, number, repeat, kernel or ()):
        report["rows"].append(row.to_dict())
        print(attention_line(report["rows"][-1]), file=sys.stderr, flush=True)
        if out:
            out.write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        print(json.dumps(report))
    else:
        print_attention(report)
