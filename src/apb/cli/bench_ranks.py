"""One rank's part of ``apb bench``: it makes the model, measures, and rank 0 prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .bench_tables import line, print_decode, print_prefill

if TYPE_CHECKING:
    from .bench import Request


def run(request: Request) -> None:
    """One rank's part; rank 0 prints."""
    from .quiet import quiet_libraries

    quiet_libraries()

    from ..benchmarks.ceilings import copy_bandwidth, measure_ceilings
    from ..benchmarks.decode import bench_decode
    from ..benchmarks.prefill import bench_prefill
    from ..distributed import launch
    from ..distributed.agreeing import together
    from ..distributed.mesh import Mesh
    from ..hardware import fingerprint
    from ..hf import counting, float8, loading
    from ..hf.random_weights import check_room, random_model
    from ..hf.tensor_parallel import share
    from ..hf.windows import layer_count

    subject = request.subject
    device = launch.local_device(loading.pick_device(subject.device))
    dtype = loading.pick_dtype(subject.dtype, device)
    rounded = float8.check(subject.quantization, device, dtype, request.tensor_parallel > 1)
    mesh = Mesh.join(device, request.tensor_parallel)
    group = mesh.everyone
    config = subject.config()
    if subject.random_weights:
        # All look before one takes: what a rank has made is no longer free for the others.
        together(group, device, lambda: check_room(config, dtype, device, group.size))
        model = random_model(config, dtype, device)
        model = float8.round_layers(model) if rounded else model
        if mesh.devices is not None:
            model = share(model, mesh.devices)
    else:
        model = loading.load_model(subject.name, dtype, device, mesh=mesh.devices, quantization=subject.quantization)
    shape = counting.model_shape(config).shared(request.tensor_parallel)
    report: dict[str, Any] = {
        "command": request.command,
        "model": subject.random_weights or subject.name,
        "layers": layer_count(config),
        "ranks": mesh.sequence.size,
        "tensor_parallel": request.tensor_parallel,
        "quantization": subject.quantization,
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
        bandwidth = report["copy_bandwidth"]
        measured = bench_decode(model, shape, request.lengths, mesh=mesh, bandwidth=bandwidth, **request.options)
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
            draw(report, Path(request.out))
    launch.leave()


def draw(report: dict[str, Any], out: Path) -> None:
    """Plots beside the file of figures, where they can be drawn."""
    from ..benchmarks.plots import write_plots
    from ..benchmarks.results import combine

    try:
        for _, path in write_plots(combine([(out.name, report)]), out):
            print(f"apb: wrote {path}", file=sys.stderr)
    except InputError as error:
        print(f"apb: no plots: {error}", file=sys.stderr)
