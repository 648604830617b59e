"""``apb doctor``: the back-ends that this machine can run, and the reasons against the others."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from ..errors import InputError, at_least
from ..hf.hub import check_there
from . import options
from .remedies import extras, of_model


def doctor(
    model: options.ModelName = None,
    ranks: Annotated[int, typer.Option(help="Ranks that it is to be read on.")] = 1,
    as_json: options.AsJson = False,
) -> None:
    """Show what this machine can run, what is missing for a model, and which command or option mends it."""
    at_least("ranks", ranks, 1)
    if model is not None:
        check_there(model)
    report = examine(model, ranks)
    if as_json:
        print(json.dumps(report))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("", "", show_header=False, title="This machine")
    for name, value in report["machine"].items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    table = Table("device", "dtype", "back-end", "used", "why", title="Attention back-ends (head dim 128)")
    for row in report["backends"]:
        table.add_row(row["device"], row["dtype"], row["backend"], "yes" if row["used"] else "no", row["why"])
    console.print(table)
    table = Table("device", "usable", "why", title="Fused layers")
    for row in report["fusing"]:
        table.add_row(row["device"], "yes" if row["usable"] else "no", row["why"])
    console.print(table)
    for part, title in (("communication", "Several ranks"), ("extras", "Optional parts"), ("model", "The model")):
        table = Table("", "usable", "why", title=title)
        for row in report[part]:
            table.add_row(row["name"], "yes" if row["usable"] else "no", escape(row["why"]))
        console.print(table)


def examine(model: str | None = None, ranks: int = 1) -> dict[str, Any]:
    """The report as plain values: ``machine``, ``backends``, ``fusing``, ``communication``, ``extras``, ``model``."""
    import psutil
    import torch
    import torch.distributed as dist

    from ..hardware import fingerprint
    from ..hf.fusing import why_not
    from ..hf.loading import shipped_model
    from .quiet import quiet_libraries

    quiet_libraries()
    cpu = torch.device("cpu")
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    machine: dict[str, Any] = fingerprint(cpu, torch.float32)
    machine["processor"] = machine.pop("device")
    del machine["dtype"]
    machine |= {
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": ", ".join(torch.cuda.get_device_name(gpu) for gpu in gpus) or "none that torch sees",
    }
    try:
        machine["shipped_model"] = str(shipped_model())
    except InputError as error:
        machine["shipped_model"] = str(error)
    has_gpu, no_gpu = bool(gpus), "torch sees no GPU"
    nccl = has_gpu and dist.is_nccl_available()
    return {
        "machine": machine,
        "backends": [
            row
            for device in (cpu, *gpus[:1])
            for dtype in (torch.float32, torch.bfloat16)
            for row in _backends(device, dtype)
        ],
        "fusing": [
            {"device": str(device), "usable": why is None, "why": why or "norms, activations and RoPE are compiled"}
            for device in (cpu, *gpus[:1])
            for why in [why_not(device)]
        ],
        "communication": [
            {"name": "gloo", "usable": dist.is_gloo_available(), "why": "ranks on the CPU"},
            {"name": "nccl", "usable": nccl, "why": "ranks on GPUs" if nccl else no_gpu},
        ],
        "extras": extras(),
        "model": of_model(model, ranks),
    }


def _backends(device: Any, dtype: Any) -> list[dict[str, Any]]:
    from ..kernels.attention import BACKENDS, choose

    chosen, reason = choose("auto", device, dtype, 128)
    rows = []
    for name in BACKENDS:
        try:
            choose(name, device, dtype, 128)
            why = reason if name == chosen else f"usable, but {chosen} is preferred"
        except InputError as error:
            why = str(error)
        rows.append(
            {
                "device": str(device),
                "dtype": str(dtype).removeprefix("torch."),
                "backend": name,
                "used": name == chosen,
                "why": why,
            }
        )
    return rows
