"""Prefill of random tokens by several strategies and lengths in one run, each compared with its plan's floor."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compressors import Compressor
from ..distributed.collectives import Group
from ..distributed.mesh import Mesh
from ..engine import Engine
from ..errors import DoesNotFit, InputError
from ..hardware import most_composed, peak_bytes
from ..hf.config import softcap, vocabulary
from ..hf.recurrent import recurrent_modules
from ..kernels.attention import choose
from ..planning.cost import Ceilings, predict
from ..planning.methods import make_method
from ..planning.propagation import Propagation
from ..planning.shape import ModelShape
from ..prompt import Prompt
from ..reading import Reading
from ..timing import Clock, clocked
from .ceilings import attention_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERY_TOKENS = 32
# The columns of the paper's tables 14 and 16, in the order of a layer.
PARTS = ("qkv", "scoring", "selection", "communication", "attention", "output", "mlp")
# The part of models with such layers alone: the whole layer, its linear maps included.
RECURRENT = "recurrent"
# Names of the output projection in the model families.
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True)
class Row:
    """One strategy at one length.

    Attributes:
        backend: the attention back-end.
        seconds: median over the repeats of the slowest rank's time; ``all_seconds`` are the repeats.
        floor_seconds: time of the plan's FLOPs alone at the ceilings measured in the same run.
        attention_rate: FLOPs per second of the back-end, measured at the start of the same run.
        predicted_seconds: FLOPs plus bytes sent and moved, without overlap, with attention at that rate;
            ``prediction_error`` is its relative error (0.1: the prediction is 10 % above the measurement).
        speedup: the first strategy's seconds at this length over this row's; None for the first strategy.
        parts: seconds by part on the first rank in one more prefill, with little overhead from the clocks; they sum to
            that prefill's time. "communication" is the time spent waiting, without the overlapped part.
        note: the reason for missing figures; if the request does not fit, ``plan`` is empty too.
        propagation: as in :class:`apb.Generation`.
    """

    strategy: str
    length: int
    exact: bool
    plan: dict[str, int]
    backend: str
    seconds: float | None = None
    all_seconds: list[float] = field(default_factory=list)
    tokens_per_s: float | None = None
    floor_seconds: float | None = None
    attention_rate: float | None = None
    predicted_seconds: float | None = None
    prediction_error: float | None = None
    of_floor: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    parts: dict[str, float] | None = None
    note: str | None = None
    propagation: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)


def bench_prefill(
    model: PreTrainedModel,
    shape: ModelShape,
    ceilings: Ceilings,
    strategies: Sequence[str],
    lengths: Sequence[int],
    repeat: int,
    max_seconds: float = math.inf,
    baseline_backend: str = "auto",
    compressor: str | Compressor | None = None,
    rounds: int | None = None,
    propagations: Sequence[Propagation | None] = (None,),
    mesh: Mesh | None = None,
    **options: Any,
) -> Iterator[Row]:
    """Yield a row for every length, strategy and propagation; the first is the baseline of the speed-ups.

    Each runs one untimed prefill, up to ``repeat`` timed ones, and one more timed by part. A case that does not fit
    into ``max_seconds``, by its floor, or into memory, by its plan, is left out with a note; the others are repeated as
    often as ``max_seconds`` allows. If memory runs out nevertheless, a single rank notes it and goes on, and several
    ranks raise torch.OutOfMemoryError, since the other ranks could not know.
    ``baseline_backend`` is the attention back-end of the first strategy, for instance "torch" for torch's own kernels.
    ``options`` are those of strategies, each given to all strategies that have it. Every rank must iterate over it.
    """
    rates: dict[str, float] = {}
    for length in lengths:
        baseline: float | None = None
        for strategy, propagation in product(strategies, propagations):
            backend = baseline_backend if strategy == strategies[0] else "auto"
            method = make_method(strategy, options, compared=True)
            engine = Engine.from_model(
                model,
                strategy=method,
                compressor=compressor,
                rounds=rounds if method.in_rounds else None,
                propagation=propagation,
                allow_extrapolation=True,
                backend=backend,
                mesh=mesh,
            )
            try:
                if backend != "auto" and backend not in rates:
                    rates[backend] = attention_rate(engine.device, engine.dtype, backend)
                reached = replace(ceilings, attention=rates.get(backend, ceilings.attention))
                row = _measure(engine, shape, ceilings, reached, length, repeat, max_seconds, baseline)
            finally:
                engine.close()
            if (strategy, propagation) == (strategies[0], propagations[0]):
                baseline = row.seconds
            yield row


def _measure(
    engine: Engine,
    shape: ModelShape,
    ceilings: Ceilings,
    reached: Ceilings,
    length: int,
    repeat: int,
    max_seconds: float,
    baseline: float | None,
) -> Row:
    backend = choose(engine.backend, engine.device, engine.dtype, shape.head_dim, softcap(engine.model.config))[0]
    try:  # before the prompt is made, which takes memory itself
        plan = engine.plan_of(prompt_lengths(engine.reading, length))
    except DoesNotFit as error:
        (method,) = engine.reading.methods
        return Row(method.name, length, method.exact, {}, backend, note=f"left out: {str(error).rstrip('.')}")
    prompt = random_prompt(engine, length)
    most = most_composed(engine.device)
    cost = predict(plan, shape, engine.dtype.itemsize, engine.reading.compressor, most_composed=most)
    floor, predicted = cost.floor(ceilings), cost.seconds(reached)
    seconds: list[float] = []
    parts = None
    note = None
    if 2 * floor > max_seconds:
        note = f"left out: two prefills take at least {2 * floor:.0f} s, and {max_seconds:.0f} are allowed"
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(engine.device)
    try:
        while note is None and len(seconds) < 1 + repeat:
            if len(seconds) > 1 and sum(seconds) + seconds[-1] > max_seconds:
                break
            seconds.append(slowest(engine.group, engine.device, engine.prefill(prompt).timing["prefill_s"]))
        if note is None and sum(seconds) + seconds[-1] <= max_seconds:
            parts = _parts(engine, prompt)
    except torch.OutOfMemoryError as error:
        if engine.group.size > 1:
            raise
        note = f"out of memory: {str(error).splitlines()[0]}"
    counted = seconds[1:]
    median = statistics.median(counted) if counted and note is None else None
    return Row(
        strategy=plan.strategy,
        length=length,
        exact=plan.exact,
        plan=plan.to_dict(),
        backend=backend,
        seconds=median,
        all_seconds=counted,
        tokens_per_s=plan.total / median if median else None,
        floor_seconds=floor,
        attention_rate=reached.attention,
        predicted_seconds=predicted,
        prediction_error=predicted / median - 1 if median else None,
        of_floor=floor / median if median else None,
        speedup=baseline / median if median and baseline else None,
        peak_bytes=int(slowest(engine.group, engine.device, peak_bytes(engine.device))) if median else None,
        predicted_peak_bytes=max(rank.peak_bytes for rank in cost.ranks),
        parts=parts,
        note=note,
        propagation=plan.propagated(),
    )


def _parts(engine: Engine, prompt: Prompt) -> dict[str, float]:
    """Seconds by part of one prefill on this rank; the remainder is "other"."""
    with clocked(engine.device) as clock, _clocked_modules(engine.model, clock):
        total = engine.prefill(prompt).timing["prefill_s"]
        seconds = clock.seconds()
    names = (*PARTS, RECURRENT) if RECURRENT in seconds else PARTS
    return {name: seconds.get(name, 0.0) for name in names} | {"other": total - sum(seconds.values())}


@contextmanager
def _clocked_modules(model: PreTrainedModel, clock: Clock) -> Iterator[None]:
    """Time the linear layers of attention and the MLPs with hooks, without changing transformers' code."""
    open_parts: list[AbstractContextManager[None]] = []
    handles: list[Any] = []

    def watch(module: nn.Module, name: str) -> None:
        def before(*_: Any) -> None:
            open_parts.append(clock.part(name))
            open_parts[-1].__enter__()

        def after(*_: Any) -> None:
            open_parts.pop().__exit__(None, None, None)

        handles.extend((module.register_forward_pre_hook(before), module.register_forward_hook(after)))

    recurrent = set(recurrent_modules(model))
    whole = ""  # path prefix of the module last timed as a whole; its children come right after it
    for path, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "layer_idx") and kind.endswith("Attention") and module not in recurrent:
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    watch(child, "output" if name in OUTPUT_NAMES else "qkv")
        elif kind.endswith(("MLP", "MoeBlock")) and not (whole and path.startswith(whole)):
            whole = f"{path}."
            watch(module, "mlp")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompt_lengths(reading: Reading, length: int) -> tuple[int, int, int]:
    """(prefix, document, query) of :func:`random_prompt` as a reading arranges it; InputError if it is too short."""
    if length <= 1 + QUERY_TOKENS:
        raise InputError(
            f"A length of {length} leaves no document beside the {QUERY_TOKENS} query tokens; use a larger one."
        )
    front = QUERY_TOKENS if reading.methods[0].question_first else 0
    return 1 + front, length - 1 - QUERY_TOKENS, QUERY_TOKENS


def random_prompt(engine: Engine, length: int) -> Prompt:
    """A prompt of ``length`` random tokens in all, the same on every rank."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vocabulary(engine.model.config), (length,), generator=generator).tolist()
    return Prompt.from_tokens(ids[:1], ids[1:-QUERY_TOKENS], ids[-QUERY_TOKENS:])


def slowest(group: Group, device: torch.device, figure: float) -> float:
    """Maximum of ``figure`` over all ranks."""
    mine = torch.tensor([figure], dtype=torch.float64, device=device)
    return float(group.all_gather(mine).wait().max())
