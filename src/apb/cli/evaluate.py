"""``apb eval``: accuracy of the model's answers, strategy by strategy."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, at_least
from . import options
from .groups import expanded

if TYPE_CHECKING:
    from ..engine import Engine
    from ..evaluation.items import Item, Skipped
    from ..evaluation.settings import Setting

app = typer.Typer(help="Measure the accuracy of the model's answers, strategy by strategy.")

Task = Annotated[list[str], typer.Option(help="Kind of question; repeat it for several.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only these tasks; repeatable. All if left out.")]
Length = Annotated[list[int], typer.Option(help="Tokens of prompt and answer together; repeatable.")]
Limit = Annotated[
    int | None,
    typer.Option(
        "--length",
        help="Most tokens of prompt and answer: longer documents lose their middle. The model's positions if left out.",
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same samples.")]
Budget = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", help="Longest answer, in tokens, for all kinds of questions: more for models that think."
    ),
]
Count = Annotated[int | None, typer.Option("--samples", help="Only the first so many of each task.")]


@app.callback()
def _group() -> None:
    """Measure the accuracy of the model's answers, strategy by strategy."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Parameters of every suite: the readings, the model, the ranks, and the output."""

    readings: options.Readings
    model: options.Model
    max_new_tokens: Budget = None
    ask_after: Annotated[
        str | None,
        typer.Option(
            help="Read the document first, for this question, another (other), none or typical ones; ask afterwards."
        ),
    ] = None
    batch_size: Annotated[
        int,
        typer.Option(
            help="Answers that are written side by side, in steps of a token for each: fewer where they do not fit."
        ),
    ] = 1
    ranks: options.RankCount = None
    out: Annotated[
        Path | None,
        typer.Option(help="Append every answer to this JSONL file; what is in it already is not answered again."),
    ] = None
    as_json: options.AsJson = False


@dataclass(frozen=True)
class Request:
    """Everything a rank needs; picklable values, so that it travels."""

    suite: str
    samples: dict[str, Any]
    readings: list[Setting]
    loading: dict[str, Any]
    out: str | None
    as_json: bool
    batch_size: int = 1
    notes: dict[str, Any] = field(default_factory=dict)


@app.command()
@expanded
def synthetic(
    *,
    task: Task,
    length: Length,
    samples: Annotated[int, typer.Option(help="Samples of each task and length.")] = 100,
    seed: Seed = 0,
    passages: Annotated[Path | None, typer.Option(help="JSONL of passages and questions, for the task qa.")] = None,
    common: Common,
) -> None:
    """Generated long-context tasks: every strategy answers the same samples."""
    from ..evaluation.synthetic import check
    from ..evaluation.tasks.passages import load_passages

    check(task, samples, None if passages is None else load_passages(passages))
    chosen = {"tasks": task, "lengths": length, "count": samples, "seed": seed, "passages": _path(passages)}
    _start("synthetic", chosen, common, {"seed": seed})


@app.command()
@expanded
def ruler(
    *,
    data: Annotated[Path, typer.Option(help="Folder with TASK/validation.jsonl, as RULER's own scripts write them.")],
    task: Tasks = None,
    samples: Count = None,
    length: Limit = None,
    common: Common,
) -> None:
    """NVIDIA RULER's own data files, with its metrics."""
    from ..evaluation.ruler import find

    find(data, task or [])
    _start("ruler", {"data": str(data), "tasks": task or [], "count": samples, "limit": length}, common)


@app.command()
@expanded
def infinitebench(
    *,
    data: Annotated[Path, typer.Option(help="Folder with InfiniteBench's own files, TASK.jsonl.")],
    task: Tasks = None,
    samples: Count = None,
    length: Limit = None,
    common: Common,
) -> None:
    """InfiniteBench's own data files, with its scoring."""
    from ..evaluation.infinitebench import find

    find(data, task or [])
    _start("infinitebench", {"data": str(data), "tasks": task or [], "count": samples, "limit": length}, common)


@app.command()
@expanded
def longbench2(
    *,
    data: Annotated[Path, typer.Option(help="LongBench v2's data.json, or the same as JSONL.")],
    task: Annotated[list[str] | None, typer.Option(help="Only these: short, medium, long; repeatable.")] = None,
    samples: Count = None,
    length: Limit = None,
    common: Common,
) -> None:
    """LongBench v2's own data file, with its prompt and its scoring."""
    from ..evaluation.items import check_file
    from ..evaluation.longbench2 import check_tasks

    check_tasks(task or [])
    check_file(data, "LongBench v2's data.json")
    _start("longbench2", {"data": str(data), "tasks": task or [], "count": samples, "limit": length}, common)


@app.command()
@expanded
def jsonl(
    *,
    data: Annotated[Path, typer.Option(help="JSONL file of document, query and answers.")],
    samples: Count = None,
    length: Limit = None,
    common: Common,
) -> None:
    """Questions of your own: a JSONL file of document, query and answers."""
    from ..evaluation.items import check_file

    check_file(data, "a JSONL file of document, query and answers")
    _start("jsonl", {"data": str(data), "count": samples, "limit": length}, common)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _start(suite: str, samples: dict[str, Any], common: Common, notes: dict[str, Any] | None = None) -> None:
    """Check the common parameters of all suites, and run the ranks."""
    from ..distributed import launch
    from ..evaluation.limits import check_length
    from ..evaluation.records import Store
    from ..evaluation.settings import ASK_AFTER
    from ..evaluation.synthetic import check_lengths
    from .checks import check_readings

    if common.ask_after not in (None, *ASK_AFTER):
        raise InputError(f"--ask-after takes {', '.join(ASK_AFTER)}, not {common.ask_after!r}.")
    limits = {"samples": samples["count"], "length": samples.get("limit"), "--max-new-tokens": common.max_new_tokens}
    for name, number in limits.items():
        if number is not None:
            at_least(name, number, 1)
    at_least("--batch-size", common.batch_size, 1)
    place, readings = check_readings(common.model, options.Ranks(common.ranks), common.readings)
    if common.ask_after is not None:
        readings = [replace(setting, ask_after=common.ask_after) for setting in readings]
    if common.out is not None:
        Store(common.out).close()  # an invalid file fails before anything is loaded
    if suite == "synthetic":  # fail before hours are spent on the shorter lengths
        check_lengths(samples["lengths"], place.config)
    elif samples["limit"] is not None:
        check_length(samples["limit"], place.config)
    samples["budget"] = common.max_new_tokens
    given = _path(common.out), common.as_json, common.batch_size, notes or {}
    request = Request(suite, samples, readings, place.loading, *given)
    launch.run(run, place.processes, request)


def run(request: Request) -> None:
    """One rank's part of an evaluation; rank 0 writes and prints."""
    from .quiet import quiet_libraries

    quiet_libraries()

    from ..distributed import launch
    from ..engine import Engine
    from ..evaluation.items import Skipped
    from ..evaluation.limits import cut_note
    from ..evaluation.records import Store, model_name
    from ..evaluation.runner import Runner
    from .progress import Bar

    engine = Engine.from_pretrained(**request.loading)
    first = engine.group.rank == 0
    skipped = Skipped()
    items, total = samples_of(request, engine, skipped)
    store = Store(Path(request.out) if request.out and first else None)
    name, budget = model_name(engine.model, request.loading["model"]), request.samples["budget"]
    runner = Runner(engine, name, request.readings, store, batch_size=request.batch_size, budget=budget)
    done = 0
    records = []
    with Bar("Answering", "sample", shown=first) as bar:

        def tell() -> None:
            nonlocal done
            done += 1
            bar.update(done, total * len(request.readings))

        for answered in runner.run(items, tell):
            records += answered
    store.close()
    launch.leave()
    if first:
        if not records:
            raise InputError(f"Not one sample could be made, so ask for a greater length: {skipped.reasons[0]}")
        for note in skipped.reasons + skipped.notes:
            print(f"apb: {note}", file=sys.stderr)
        from .tables import print_results

        if runner.cuts:
            print(f"apb: {cut_note(runner.cuts, total)}", file=sys.stderr)
        cut = {"cut_documents": len(runner.cuts), "most_cut_tokens": max(runner.cuts, default=0)}
        print_results(records, request.as_json, request.notes | cut, len(skipped.reasons))


def samples_of(request: Request, engine: Engine, skipped: Skipped) -> tuple[Any, int]:
    """The samples of a request's suite (iterable) and their number; InputError if there are none."""
    from itertools import chain, product

    from ..evaluation import infinitebench, jsonl, longbench2, ruler, synthetic
    from ..evaluation.items import each_with_another_query
    from ..evaluation.limits import needed_limit, within
    from ..evaluation.tasks.passages import load_passages
    from ..hf.loading import position_limit

    wanted = request.samples
    tokenizer = engine.tokenizer
    assert tokenizer is not None, "from_pretrained loads one"
    if request.suite == "synthetic":
        passages = None if wanted["passages"] is None else load_passages(Path(wanted["passages"]))
        cells = list(product(wanted["tasks"], wanted["lengths"]))
        count, seed = wanted["count"], wanted["seed"]
        rest = {"budget": wanted["budget"], "skipped": skipped}
        made = (synthetic.items(tokenizer, task, length, count, seed, passages, **rest) for task, length in cells)
        return chain.from_iterable(made), len(cells) * count
    path, count, limit = Path(wanted["data"]), wanted["count"], wanted["limit"]
    config = engine.model.config
    found: list[Item]
    if request.suite == "ruler":
        files = ruler.find(path, wanted["tasks"])
        parts = [ruler.items(files[task], task, tokenizer, skipped, count, limit) for task in files]
        found = [item for part in parts for item in part]
    elif request.suite == "infinitebench":
        files, limit = infinitebench.find(path, wanted["tasks"]), needed_limit(limit, config)
        read = [infinitebench.items(files[task], task, skipped, limit, count) for task in files]
        found = [item for part in read for item in part]
    elif request.suite == "longbench2":
        found = list(longbench2.items(path, wanted["tasks"], skipped, needed_limit(limit, config), count))
    else:
        found = list(jsonl.items(path, tokenizer, skipped, count, limit))
    if wanted["budget"] is not None:
        found = [replace(item, max_new_tokens=wanted["budget"]) for item in found]
    if not found:
        reason = f": {skipped.reasons[0]}" if skipped.reasons else ""
        raise InputError(f"There is no sample in {str(path)!r}{reason}.")
    return [within(item, position_limit(config)) for item in each_with_another_query(found)], len(found)
