"""A pool of worker processes, each with its own engine on a GPU (round-robin) or on the CPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apb.engine import Engine

_engine: Engine | None = None


def pool(model: str, jobs: int, threads: int = 1, quantization: str | None = None) -> ProcessPoolExecutor:
    """A pool of ``jobs`` processes with the model loaded; their tasks get it from :func:`engine`."""
    import torch

    context = get_context("spawn")
    places = context.SimpleQueue()
    for number in range(jobs):
        places.put(f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    return ProcessPoolExecutor(jobs, context, _take_place, (model, places, threads, quantization))


def start(
    model: str, device: str, threads: int = 1, fused: bool | None = False, quantization: str | None = None
) -> None:
    """Load the model in this process; ``fused`` and ``quantization`` as :class:`apb.Engine` takes them."""
    import torch

    from apb.engine import Engine

    global _engine  # noqa: PLW0603  # one model per process, for all its tasks
    torch.set_num_threads(threads)
    dtype = "float32" if device == "cpu" else "bfloat16"  # in which most CPUs take many times as long
    _engine = Engine.from_pretrained(model, device=device, dtype=dtype, fused=fused, quantization=quantization)


def engine() -> Engine:
    """The engine of this process."""
    assert _engine is not None, "made by start"
    return _engine


def _take_place(model: str, places: Any, threads: int, quantization: str | None) -> None:
    start(model, places.get(), threads, quantization=quantization)
