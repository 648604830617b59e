"""``apb bench``: how fast, beside a baseline and the floor."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, at_least
from . import options
from .bench_tables import attention_line, line, print_attention, print_decode, print_prefill

app = typer.Typer(help="How fast, beside a baseline of the same run and the floor.")


@app.callback()
def _group() -> None:
    """How fast, beside a baseline of the same run and the floor."""


@dataclass(frozen=True)
class Request:
    """Everything a rank needs; plain values, so that it travels."""

    what: str
    tensor_parallel: int
    model: str | None
    random_weights: str | None
    layers: int | None
    lengths: list[int]
    options: dict[str, Any]
    dtype: str | None
    device: str
    out: str | None
    as_json: bool
    command: str


Length = Annotated[list[int], typer.Option(help="Tokens of the prompt; repeatable.")]
Layers = Annotated[int | None, typer.Option(help="With random weights: only so many layers.")]
Out = Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")]
PlottedOut = Annotated[
    Path | None, typer.Option(help="Also write the figures there, as JSON, and plots beside it (apb[report]).")
]


@app.command()
def prefill(
    length: Length,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategies, the baseline first; repeatable. By default full and apb.")
    ] = None,
    model: options.Model = None,
    random_weights: options.RandomWeights = None,
    layers: Layers = None,
    repeat: Annotated[int, typer.Option(help="Counted repeats; the median is reported.")] = 3,
    max_seconds: Annotated[
        float | None, typer.Option(help="Leave out what takes longer, for each strategy and length in all.")
    ] = None,
    baseline_backend: Annotated[
        str, typer.Option(help="Attention of the first strategy: torch for the kernels that torch brings.")
    ] = "auto",
    blocks: options.Blocks = None,
    rounds: options.Rounds = None,
    ranks: options.Ranks = None,
    tensor_parallel: options.TensorParallel = 1,
    anchor_length: options.AnchorLength = None,
    passing_length: options.PassingLength = None,
    compressor: options.Compressor = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    out: PlottedOut = None,
    as_json: options.AsJson = False,
) -> None:
    """Prefill by several strategies and lengths: seconds, tokens per second, share of the floor, peak memory."""
    from ..compressors import make_compressor
    from ..kernels.attention import BACKENDS
    from ..planning.methods import method_named

    at_least("repeat", repeat, 1)
    names = strategy or ["full", "apb"]
    for name in names:
        method_named(name)
    reading = {
        "blocks": blocks,
        "rounds": rounds,
        "anchor_length": anchor_length,
        "passing_length": passing_length,
        "compressor": compressor,
    }
    limit = math.inf if max_seconds is None else max_seconds
    if not limit > 0:
        raise InputError(f"--max-seconds takes a number above 0, not {limit:g}.")
    if baseline_backend not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise InputError(f"Unknown attention back-end {baseline_backend!r}; choose one of {known}.")
    if compressor is not None:
        make_compressor(compressor)
    chosen = {
        "strategies": names,
        "repeat": repeat,
        "max_seconds": limit,
        "baseline_backend": baseline_backend,
        **reading,
    }
    at_least("tensor-parallel", tensor_parallel, 1)
    _launch(
        "prefill", model, random_weights, layers, length, chosen, ranks, dtype, device, out, as_json, tensor_parallel
    )


@app.command()
def decode(
    length: Length,
    strategy: options.Strategy = "apb",
    model: options.Model = None,
    random_weights: options.RandomWeights = None,
    layers: Layers = None,
    tokens: Annotated[int, typer.Option(help="Counted tokens; the median is reported.")] = 32,
    blocks: options.Blocks = None,
    ranks: options.Ranks = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    out: Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Decode after long prompts: seconds a token, with and without CUDA graphs, beside the limit of memory."""

    at_least("tokens", tokens, 1)
    chosen = {"tokens": tokens, "strategy": strategy, "blocks": blocks}
    _launch("decode", model, random_weights, layers, length, chosen, ranks, dtype, device, out, as_json)


def _launch(
    what: str,
    model: str | None,
    random_weights: str | None,
    layers: int | None,
    lengths: list[int],
    chosen: dict[str, Any],
    ranks: int | None,
    dtype: str | None,
    device: str | None,
    out: Path | None,
    as_json: bool,
    tensor_parallel: int = 1,
) -> None:
    from ..benchmarks.prefill import QUERY_TOKENS
    from ..distributed import launch
    from ..hf import loading
    from ..hf.random_weights import config_of
    from ..hf.tensor_parallel import check_shards
    from .quiet import quiet_libraries

    quiet_libraries()
    for length in lengths:
        at_least("length", length, QUERY_TOKENS + 1)
    if layers is not None and not random_weights:
        raise InputError("--layers goes with --random-weights: a checkpoint's model is run with all of its layers.")
    if out is not None:
        options.check_out(out)
    check_shards(config_of(model, random_weights), tensor_parallel)
    place = loading.pick_device(device)
    request = Request(
        what=what,
        tensor_parallel=tensor_parallel,
        model=None if random_weights else str(model or loading.shipped_model()),
        random_weights=random_weights,
        layers=layers,
        lengths=lengths,
        options=chosen,
        dtype=dtype,
        device=place.type,
        out=None if out is None else str(out),
        as_json=as_json,
        command="apb " + " ".join(sys.argv[1:]),
    )
    launch.run(run, launch.ranks_to_use(ranks, place, tensor_parallel) * tensor_parallel, request)


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
    out: Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")] = None,
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
        "command": "apb " + " ".join(sys.argv[1:]),
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


def run(request: Request) -> None:
    """One rank's part; rank 0 prints."""
    from ..benchmarks.ceilings import copy_bandwidth, measure_ceilings
    from ..benchmarks.decode import bench_decode
    from ..benchmarks.prefill import bench_prefill
    from ..distributed import launch
    from ..distributed.mesh import Mesh
    from ..hardware import fingerprint
    from ..hf import counting, loading
    from ..hf.random_weights import random_model, shape_config
    from ..hf.tensor_parallel import share
    from .quiet import quiet_libraries

    quiet_libraries()
    device = launch.local_device(loading.pick_device(request.device))
    dtype = loading.pick_dtype(request.dtype, device)
    mesh = Mesh.join(device, request.tensor_parallel)
    group = mesh.everyone
    if request.random_weights:
        config = shape_config(request.random_weights, request.layers)
        model = random_model(config, dtype, device)
        if mesh.devices is not None:
            model = share(model, mesh.devices)
    else:
        assert request.model is not None
        config = loading.load_config(request.model)
        model = loading.load_model(request.model, dtype, device, mesh=mesh.devices)
    shape = counting.model_shape(config).shared(request.tensor_parallel)
    report = {
        "command": request.command,
        "model": request.random_weights or request.model,
        "layers": config.get_text_config().num_hidden_layers,
        "ranks": mesh.sequence.size,
        "tensor_parallel": request.tensor_parallel,
        "fingerprint": fingerprint(device, dtype),
        "rows": [],
    }
    measured: Iterator[Any]
    if request.what == "prefill":
        ceilings = measure_ceilings(device, dtype, group)
        report["ceilings"] = asdict(ceilings)
        measured = bench_prefill(model, shape, ceilings, lengths=request.lengths, mesh=mesh, **request.options)
    else:
        report["copy_bandwidth"] = copy_bandwidth(device)
        measured = bench_decode(model, shape, request.lengths, bandwidth=report["copy_bandwidth"], **request.options)
    for row in measured:
        report["rows"].append(row.to_dict())
        if group.rank == 0:
            print(line(report["rows"][-1]), file=sys.stderr, flush=True)
            if request.out:
                Path(request.out).write_text(json.dumps(report, indent=1) + "\n")
    if group.rank == 0:
        if request.as_json:
            print(json.dumps(report))
        else:
            (print_prefill if request.what == "prefill" else print_decode)(report)
        if request.what == "prefill" and request.out:
            _draw(report, Path(request.out))
    launch.leave()


def _draw(report: dict[str, Any], out: Path) -> None:
    """Plots beside the file of figures, where they can be drawn."""
    from ..benchmarks.plots import write_plots
    from ..benchmarks.results import combine

    try:
        for _, path in write_plots(combine([(out.name, report)]), out):
            print(f"apb: wrote {path}", file=sys.stderr)
    except InputError as error:
        print(f"apb: no plots: {error}", file=sys.stderr)
