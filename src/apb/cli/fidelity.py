"""``apb eval fidelity``: share of full attention that an approximation keeps, and divergence of its predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, at_least
from . import options
from .evaluate import Length, Seed, Task
from .groups import expanded
from .tables import console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..prompt import Prompt
    from .progress import Bar


@expanded
def fidelity(
    *,
    task: Task,
    length: Length,
    samples: Annotated[int, typer.Option(help="Documents of each task and length.")] = 4,
    rows: Annotated[int, typer.Option(help="Rows of each document that are looked at, drawn by lot.")] = 128,
    seed: Seed = 0,
    readings: options.Readings,
    model: options.Model,
    as_json: options.AsJson = False,
) -> None:
    """Share of full attention's mass on keys that are still seen, per layer and KV head, and KL of predictions."""
    from ..engine import Engine
    from ..evaluation import synthetic
    from ..evaluation.fidelity import measure
    from .checks import check_readings
    from .progress import Bar

    synthetic.check(task, samples)
    at_least("rows", rows, 1)
    if readings.decode.made() != options.Decodings(options={}).made():
        raise InputError("This looks at how texts are read; for decode methods there is apb eval decode.")
    place, chosen = check_readings(model, options.Ranks(), readings)
    synthetic.check_lengths(length, place.config)
    engine = Engine.from_pretrained(**place.loading)
    assert engine.tokenizer is not None, "from_pretrained loads one"
    with Bar("Reading", "prefill", shown=True) as bar:
        figures = columns(
            Drawn(engine.tokenizer, task, length, samples, seed),
            len(chosen) + 1,
            bar,
            lambda prompt, tell: measure(engine, prompt, chosen, rows, seed, tell),
        )
        results = [where | {"samples": samples} | mean(column) for where, column in figures]
    if as_json:
        print(json.dumps({"seed": seed, "results": results}))
    else:
        _print(results)


@dataclass(frozen=True)
class Drawn:
    """Generated texts: ``samples`` of each task and length."""

    tokenizer: PreTrainedTokenizerBase
    task: list[str]
    length: list[int]
    samples: int
    seed: int


def columns(
    drawn: Drawn, parts: int, bar: Bar, measure: Callable[[Prompt, Callable[[], None]], list[Any]]
) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """Measure every text: by task, length and what is compared, all texts' figures.

    ``measure`` gives those of one prompt, one for each that is compared, and calls the function that it is given after
    each of ``parts`` parts, which the bar counts.
    """
    from ..evaluation import synthetic

    total, done = len(drawn.task) * len(drawn.length) * drawn.samples * parts, 0

    def tell() -> None:
        nonlocal done
        done += 1
        bar.update(done, total)

    for kind in drawn.task:
        for size in drawn.length:
            items = synthetic.items(drawn.tokenizer, kind, size, drawn.samples, drawn.seed)
            found = [measure(item.prompt(drawn.tokenizer), tell) for item in items]
            for column in zip(*found, strict=True):
                yield {"task": kind, "length": size}, column


def mean(found: Any) -> dict[str, Any]:
    """The mean of several documents' figures, as plain values; ``mass_min`` is the least of any layer and KV head."""
    import numpy

    first = found[0].to_dict()
    mass = numpy.mean([one.mass for one in found], 0)
    figures = {name: numpy.mean([getattr(one, name) for one in found]) for name in FIGURES}
    return {
        **first,
        "rows": sum(one.rows for one in found),
        "mass": mass.tolist(),
        "mass_mean": float(mass.mean()),
        "mass_min": float(mass.min()),
        **{name: float(value) for name, value in figures.items()},
    }


FIGURES = ("kl_document", "kl_answer", "agreement")


def _print(results: list[dict[str, Any]]) -> None:

    from rich.table import Table

    columns = ("task", "length", "reading", "mass", "least head", "KL document", "KL answer", "same token")
    table = Table(*columns, title="Mass of full attention on visible keys; KL in nats; sampled rows of the document")
    for row in results:
        reading = f"{row['strategy']} {row['compressor'] or ''}".strip() + f", {row['blocks']} blocks"
        table.add_row(
            row["task"],
            f"{row['length']:,}",
            reading,
            f"{row['mass_mean']:.3f}",
            f"{row['mass_min']:.3f}",
            f"{row['kl_document']:.4f}",
            f"{row['kl_answer']:.4f}",
            f"{row['agreement']:.1%}",
        )
    console().print(table)
    for row in results:
        reading = f"{row['task']} at {row['length']:,}: {row['strategy']} {row['compressor'] or ''}".strip()
        heads = (f"KV head {number}" for number in range(len(row["mass"][0])))
        table = Table("layer", *heads, title=f"{reading}, {row['blocks']} blocks: mass")
        for number, shares in enumerate(row["mass"]):
            table.add_row(str(number), *(f"{share:.3f}" for share in shares))
        console().print(table)
