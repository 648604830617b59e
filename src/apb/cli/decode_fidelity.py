"""``apb eval decode``: the attention that decode methods recall, and the divergence of what they predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import at_least
from . import options
from .evaluate import Length, Seed, Task
from .fidelity import Drawn, columns
from .groups import expanded
from .tables import console


@expanded
def decode(
    *,
    task: Task,
    length: Length,
    samples: Annotated[int, typer.Option(help="Documents of each task and length.")] = 8,
    tokens: Annotated[int, typer.Option(help="Most tokens of each answer, one decode step each.")] = 16,
    seed: Seed = 0,
    methods: options.Decodings,
    model: options.Model,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Share of exact attention's mass that decode methods attend to, layer by layer, and KL of the next token."""
    from ..engine import Engine
    from ..evaluation import synthetic
    from ..evaluation.decode_fidelity import measure
    from ..hardware import fingerprint
    from .checks import check
    from .progress import Bar

    at_least("tokens", tokens, 1)
    if out is not None:
        options.check_out(out)
    chosen = methods.made()
    synthetic.check(task, samples)
    place = check(model, options.Ranks())
    synthetic.check_lengths(length, place.config)
    engine = Engine.from_pretrained(**place.loading)
    assert engine.tokenizer is not None, "from_pretrained loads one"
    with Bar("Answering", "answer", shown=True) as bar:
        figures = columns(
            Drawn(engine.tokenizer, task, length, samples, seed),
            len(chosen) + 1,
            bar,
            lambda prompt, tell: measure(engine, prompt, chosen, tokens, tell),
        )
        results = [where | mean(column) for where, column in figures]
    report = {
        "command": options.typed(),
        "model": place.model.name,
        "fingerprint": fingerprint(engine.device, engine.dtype),
        "seed": seed,
        "results": results,
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(report))
    else:
        _print(results)


FIGURES = ("share", "mass_mean", "mass_min", "kl", "agreement")


def mean(found: Any) -> dict[str, Any]:
    """The means of several documents' figures, as plain values, with 95 % bootstrap intervals over the documents."""
    import numpy

    from ..evaluation.statistics import bootstrap

    rows = [each.to_dict() | {"mass_mean": float(numpy.mean(each.mass))} for each in found]
    figures = {name: [row[name] for row in rows] for name in FIGURES}
    return {
        "decode": found[0].decode,
        "samples": len(found),
        "tokens": sum(each.tokens for each in found),
        **{name: float(numpy.mean(values)) for name, values in figures.items()},
        "intervals": {name: bootstrap(values) for name, values in figures.items()},
        "mass": numpy.mean([each.mass for each in found], 0).tolist(),
    }


def _print(results: list[dict[str, Any]]) -> None:
    from rich.table import Table

    columns = ("task", "length", "decode", "keys read", "mass", "least layer", "least head", "KL", "same token")
    table = Table(*columns, title="Mass of exact attention on the keys attended to; KL in nats; decode steps")
    for row in results:
        table.add_row(
            row["task"],
            f"{row['length']:,}",
            row["decode"],
            f"{row['share']:.1%}",
            f"{row['mass_mean']:.3f}",
            f"{min(row['mass']):.3f}",
            f"{row['mass_min']:.3f}",
            f"{row['kl']:.4f}",
            f"{row['agreement']:.1%}",
        )
    console().print(table)
