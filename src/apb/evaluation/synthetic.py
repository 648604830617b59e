"""Scores on the generated tasks: the same samples for every strategy, answered by the engine as a user's would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

from ..engine import Engine
from ..errors import InputError
from ..plan import METHODS, Anchor, method_of
from ..prompt import Prompt
from .tasks import TASKS, Sample, generate, score

# Tokens beyond the expected answer that a model may spend before it is cut off.
_SPARE_TOKENS = 8
# Samples of different base seeds do not overlap as long as fewer than this are drawn.
_SEED_STRIDE = 1_000_000


@dataclass(frozen=True)
class Setting:
    """One way to read the samples, as the engine's options of the same names; None leaves a choice to the plan."""

    strategy: str
    blocks: int | None = None
    compressor: str | None = None
    anchor_length: int | None = None
    passing_length: int | None = None
    heads: str | None = None

    def engine(self, engine: Engine) -> Engine:
        """An engine of this setting on another's model; close it when done."""
        return Engine.from_model(engine.model, engine.tokenizer, fused=engine.fused, **asdict(self))


@dataclass(frozen=True)
class Result:
    """One cell of the table: the mean score, 0 to 100, of ``samples`` samples, and the plan that was used."""

    task: str
    length: int
    strategy: str
    compressor: str | None
    blocks: int
    anchor_length: int
    passing_length: int
    samples: int
    score: float

    def to_dict(self) -> dict[str, object]:
        """All fields as plain Python values."""
        return asdict(self)


def settings(
    strategies: Sequence[str],
    blocks: Sequence[int],
    compressors: Sequence[str],
    anchor_length: int | None = None,
    passing_length: int | None = None,
    heads: str | None = None,
) -> list[Setting]:
    """All combinations that differ: blocks count only where a strategy cuts, compressors only where it passes.

    ``heads`` is the file that the compressor "retaining" scores with.
    """
    found: dict[Setting, None] = {}
    counts: list[int | None] = [*blocks] or [None]
    for strategy, count, compressor in product(strategies, counts, compressors or ["query"]):
        cuts = method_of(strategy).blocks is None
        passes = METHODS[strategy].anchor is Anchor.WITH_QUERY
        setting = Setting(
            strategy,
            count if cuts else None,
            compressor if passes else None,
            anchor_length if cuts else None,
            passing_length if passes else None,
            heads if passes and compressor == "retaining" else None,
        )
        found[setting] = None
    return list(found)


def draw(engine: Engine, task: str, length: int, count: int, seed: int) -> list[tuple[Sample, Prompt]]:
    """``count`` samples of a task, of ``length`` tokens with their answers' room; the same for the same arguments."""
    if task not in TASKS:
        raise InputError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    if count < 1:
        raise InputError(f"Samples must be at least 1, not {count}.")
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    samples = [generate(task, tokenizer, length, seed * _SEED_STRIDE + index) for index in range(count)]
    return [(sample, Prompt.for_model(tokenizer, sample.document, sample.query)) for sample in samples]


def predict(engine: Engine, sample: Sample, prompt: Prompt) -> str:
    """The engine's answer to a sample, decoded greedily."""
    assert engine.tokenizer is not None
    room = len(engine.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]) + _SPARE_TOKENS
    return engine.generate(prompt, max_new_tokens=room).text


def evaluate(
    engine: Engine,
    tasks: Sequence[str],
    lengths: Sequence[int],
    chosen: Sequence[Setting],
    count: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Result]:
    """Yield a result for every task, length and setting; all settings of a task and length see the same samples."""
    cells = list(product(tasks, lengths))
    done, total = 0, len(cells) * len(chosen) * count
    for task, length in cells:
        samples = draw(engine, task, length, count, seed)
        for setting in chosen:
            reader = setting.engine(engine)
            scores = []
            for sample, prompt in samples:
                scores.append(score(sample, predict(reader, sample, prompt)))
                done += 1
                if progress is not None:
                    progress(done, total)
            plan = reader.plan(samples[0][1])
            reader.close()
            yield Result(
                task,
                length,
                setting.strategy,
                setting.compressor if plan.passing_length else None,
                plan.blocks,
                plan.anchor_length,
                plan.passing_length,
                count,
                sum(scores) / count,
            )
