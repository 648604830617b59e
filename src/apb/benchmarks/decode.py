"""Decode after a long prompt, or several at once: seconds per token, and the time to read weights and cache."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..decoding.base import LayerIndex
from ..distributed.mesh import Mesh
from ..distributed.one_shot import QuickGroup, quick
from ..engine import Engine
from ..errors import DoesNotFit
from ..hardware import Hardware, Stopwatch, free_memory, peak_bytes
from ..hf.config import tied_embeddings
from ..planning.shape import ModelShape
from ..reading import Reading
from ..session import Session, extend_together
from .prefill import prompt_lengths, random_prompt, slowest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Untimed steps: the first ones compile kernels, and the second one captures the graph.
WARM_UP = 4


@dataclass(frozen=True)
class Row:
    """Decode at one length.

    Attributes:
        sessions: texts of that length that are decoded at once.
        together: True if a token of each was read in one pass, False if they took turns.
        graph: True if steps were replayed as a CUDA graph.
        seconds: median of a token of each session on the slowest rank; ``tokens_per_s`` counts those of all sessions.
        weight_bytes, cache_bytes: bytes that a process reads in that time: its weights but an untied embedding table,
            once for every pass, and the largest shards of the caches.
        limit_seconds: time to read those bytes at the copy bandwidth measured in the same run.
        of_limit: limit_seconds / seconds.
        same_tokens: True if the same tokens were chosen as in turns without the graph; None in that row.
        decode: the decode method's name.
        share: of the keys that rank 0's first session attended to; limits count all of them.
        read_seconds: of reading one text, and index_seconds of then making what the decode method derives from its
            keys, on the slowest rank; index_bytes, of that, on the rank with the most.
        messages: what carried small messages between GPUs.
    """

    length: int
    sessions: int
    together: bool
    graph: bool
    seconds: float
    tokens_per_s: float
    weight_bytes: int
    cache_bytes: int
    limit_seconds: float
    of_limit: float
    peak_bytes: int
    same_tokens: bool | None
    decode: str
    share: float
    read_seconds: float
    index_seconds: float
    index_bytes: int
    messages: str | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)


def bench_decode(
    model: PreTrainedModel,
    shape: ModelShape,
    lengths: Sequence[int],
    tokens: int,
    bandwidth: float,
    sessions: Sequence[int] = (1,),
    mesh: Mesh | None = None,
    **reading: Any,
) -> Iterator[Row]:
    """Yield a row for every length and number of sessions: in turns, for several sessions also in one pass, and on GPUs
    others of both with CUDA graphs if they can be captured.

    The prompt is random tokens; ``reading`` are the engine's options. ``tokens`` steps are timed one by one.
    ``shape`` is of one process's share of the weights. ``bandwidth``: bytes per second of a copy. Every process must
    iterate over it.
    """
    for length in lengths:
        plain: dict[int, list[int]] = {}
        for graphs in (False, True)[: 1 + (next(model.parameters()).device.type == "cuda")]:
            engine = Engine.from_model(model, allow_extrapolation=True, graphs=graphs, mesh=mesh, **reading)
            try:
                measured = _rows(engine, shape, length, tokens, bandwidth, sessions, plain)
                yield from (row for row in measured if row.graph == graphs)
            finally:
                engine.close()


def check_room(
    reading: Reading,
    config: Any,
    hardware: Hardware,
    length: int,
    sessions: int,
    tokens: int,
    ranks: int,
    tensor: int,
) -> None:
    """DoesNotFit if a rank's memory cannot hold so many sessions of a length, each with its counted tokens.

    ``tensor``: processes that share a rank's weights.
    """
    room = WARM_UP + tokens
    plan = reading.plan(prompt_lengths(reading, length), ranks, config, hardware, room, tensor)
    _, cache, free = reading.demand(plan, config, hardware, room, tensor)
    if reading.decoding.offloads:
        free = free_memory(torch.device("cpu"), ranks * tensor)
    if sessions * cache > free:
        raise DoesNotFit(
            f"The caches of {sessions:,} sessions of {length:,} tokens take {sessions * cache / 2**30:.1f} GiB a rank, "
            f"and {free / 2**30:.1f} GiB are there for them; what fits is {free // cache:,} sessions."
        )


def _rows(
    engine: Engine,
    shape: ModelShape,
    length: int,
    tokens: int,
    bandwidth: float,
    sessions: Sequence[int],
    plain: dict[int, list[int]],
) -> Iterator[Row]:
    """Rows of one engine; ``plain``: by number of sessions the tokens that were chosen at first, which it fills.

    The sessions are held here alone, so that they are gone before those of the next engine need their memory.
    """
    every = list(_sessions(engine, length, max(sessions), WARM_UP + tokens))
    after = every[0].logits
    for count, together in ((count, way) for count in sessions for way in (False, True)):
        if together and (count == 1 or every[0].why_alone is not None):
            continue
        for session in every[:count]:
            session.rewind(length, after)
        read = _Read(every[:count], together)
        row, chosen = _measure(engine, shape, read, length, tokens, bandwidth, plain.get(count))
        plain.setdefault(count, chosen)
        yield row


@dataclass(frozen=True)
class _Read:
    """Sessions, and how their next tokens are read: in one pass, or in turns."""

    sessions: Sequence[Session]
    together: bool

    def __call__(self, tokens: Sequence[int]) -> None:
        if self.together:
            extend_together(self.sessions, tokens)
            return
        for session, token in zip(self.sessions, tokens, strict=True):
            session.extend([token])


def _sessions(engine: Engine, length: int, count: int, room: int) -> Iterator[Session]:
    """Sessions of one text, which is read once; each has keys and values in memory of its own."""
    prompt = random_prompt(engine, length)
    first = engine.prefill(prompt, max_new_tokens=room)
    watch = Stopwatch(engine.device)
    engine.reading.decoding.build(first.cache)
    first.timing["index_s"] = watch.seconds()
    yield first
    arranged = engine.reading.arranged(prompt)
    for _ in range(count - 1):
        yield engine.session(first.plan, arranged, first.cache.copy(length, room), first.logits, 0.0, room)


def _measure(
    engine: Engine,
    shape: ModelShape,
    read: _Read,
    length: int,
    tokens: int,
    bandwidth: float,
    plain: list[int] | None,
) -> tuple[Row, list[int]]:
    everyone, tensor = engine.mesh.everyone, engine.mesh.tensor.size
    chosen: list[int] = []
    seconds: list[float] = []
    for step in range(WARM_UP + tokens):
        # Each session goes on with another token, which other experts may see to.
        best = [int(session.logits.argmax()) for session in read.sessions]
        picked = [(token + number) % shape.vocabulary for number, token in enumerate(best)]
        chosen += picked
        watch = Stopwatch(engine.device)
        read(picked)
        if step >= WARM_UP:
            seconds.append(slowest(everyone, engine.device, watch.seconds()))
    width, count, first = engine.dtype.itemsize, len(read.sessions), read.sessions[0]
    tied = tied_embeddings(engine.model.config)
    once = (shape.parameters - (0 if tied else shape.vocabulary * shape.hidden // tensor)) * width
    weights = once * (1 if read.together else count)
    # On the rank with the largest shard.
    cache = int(slowest(everyone, engine.device, sum(session.cache_bytes() for session in read.sessions)))
    limit = (weights + cache) / bandwidth
    median = statistics.median(seconds)
    row = Row(
        length=length,
        sessions=count,
        together=read.together,
        graph=first.captured,
        seconds=median,
        tokens_per_s=count / median,
        weight_bytes=weights,
        cache_bytes=cache,
        limit_seconds=limit,
        of_limit=limit / median,
        peak_bytes=int(slowest(everyone, engine.device, peak_bytes(engine.device))),
        same_tokens=None if plain is None else chosen == plain,
        decode=engine.reading.decoding.name,
        share=first.share,
        read_seconds=slowest(everyone, engine.device, first.timing["prefill_s"]),
        index_seconds=slowest(everyone, engine.device, first.timing["index_s"]),
        index_bytes=int(slowest(everyone, engine.device, sum(map(index_bytes, first.cache.indexes.values())))),
        messages=_messages(engine),
    )
    return row, chosen


def index_bytes(layers: Mapping[int, LayerIndex]) -> int:
    """Bytes of the tensors of one kind of index, by layer."""
    return sum(part.nbytes for index in layers.values() for part in index.tensors().values())


def _messages(engine: Engine) -> str | None:
    """What carried small messages, or why it was not kernels; None if nothing was sent between GPUs."""
    groups = [group for group in (engine.mesh.sequence, engine.mesh.tensor) if group.size > 1]
    if not groups or engine.device.type != "cuda":
        return None
    found = set()
    for group in groups:
        made, lacking = quick(group, engine.device)
        kinds = [type(kind).__name__ for kind in made.kinds] if isinstance(made, QuickGroup) else ["NCCL"]
        found.add(" and ".join(kinds) + (f" ({lacking})" if lacking else ""))
    return ", ".join(sorted(found))
