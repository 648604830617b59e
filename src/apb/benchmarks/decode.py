"""Decode after a long prompt: seconds per token, and the time it takes to read weights and cache once."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..engine import Engine
from ..hardware import Stopwatch, peak_bytes
from ..hf.config import tied_embeddings
from ..planning.shape import ModelShape
from .prefill import random_prompt, slowest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Untimed steps: the first ones compile kernels, and the second one captures the graph.
WARM_UP = 4


@dataclass(frozen=True)
class Row:
    """Decode at one length.

    Attributes:
        graph: True if steps were replayed as a CUDA graph.
        seconds: median of a step on the slowest rank; ``tokens_per_s`` is its inverse.
        weight_bytes, cache_bytes: bytes that a rank reads per token: all weights but an untied embedding table, and the
            largest shard of the cache.
        limit_seconds: time to read those bytes at the copy bandwidth measured in the same run.
        of_limit: limit_seconds / seconds.
        same_tokens: True if greedy decoding chose the same tokens as without the graph; None in the row without it.
    """

    length: int
    graph: bool
    seconds: float
    tokens_per_s: float
    weight_bytes: int
    cache_bytes: int
    limit_seconds: float
    of_limit: float
    peak_bytes: int
    same_tokens: bool | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)


def bench_decode(
    model: PreTrainedModel, shape: ModelShape, lengths: Sequence[int], tokens: int, bandwidth: float, **reading: Any
) -> Iterator[Row]:
    """Yield a row for every length, and on GPUs a second one with CUDA graphs if they can be captured.

    The prompt is random tokens; ``reading`` are the engine's options. ``tokens`` steps are timed one by one.
    ``bandwidth``: bytes per second of a copy. Every rank must iterate over it.
    """
    for length in lengths:
        plain: list[int] | None = None
        for graphs in (False, True)[: 1 + (next(model.parameters()).device.type == "cuda")]:
            engine = Engine.from_model(model, allow_extrapolation=True, graphs=graphs, **reading)
            try:
                row, chosen = _measure(engine, shape, length, tokens, bandwidth, plain)
            finally:
                engine.close()
            plain = chosen
            if row.graph == graphs:
                yield row


def _measure(
    engine: Engine, shape: ModelShape, length: int, tokens: int, bandwidth: float, plain: list[int] | None
) -> tuple[Row, list[int]]:
    session = engine.prefill(random_prompt(engine, length), max_new_tokens=WARM_UP + tokens)
    chosen: list[int] = []
    seconds: list[float] = []
    for step in range(WARM_UP + tokens):
        chosen.append(int(session.logits.argmax()))
        watch = Stopwatch(engine.device)
        session.extend(chosen[-1:])
        if step >= WARM_UP:
            seconds.append(slowest(engine.group, engine.device, watch.seconds()))
    width = engine.dtype.itemsize
    tied = tied_embeddings(engine.model.config)
    weights = (shape.parameters - (0 if tied else shape.vocabulary * shape.hidden)) * width
    # On the rank with the largest shard.
    cache = int(slowest(engine.group, engine.device, session.cache_bytes()))
    limit = (weights + cache) / bandwidth
    median = statistics.median(seconds)
    row = Row(
        length=length,
        graph=session.captured,
        seconds=median,
        tokens_per_s=1 / median,
        weight_bytes=weights,
        cache_bytes=cache,
        limit_seconds=limit,
        of_limit=limit / median,
        peak_bytes=int(slowest(engine.group, engine.device, peak_bytes(engine.device))),
        same_tokens=None if plain is None else chosen == plain,
    )
    return row, chosen
