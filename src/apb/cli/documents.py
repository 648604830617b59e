"""``apb read``, ``apb ask`` and ``apb documents``: texts that are read once and asked many times."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from . import options
from .generate import attended, printed, read_document
from .groups import expanded, values

Store = Annotated[Path, typer.Argument(help="Folder of a document that apb read has written.")]


@dataclass(frozen=True)
class StoredModel(options.RemoteModel):
    """The checkpoint of a stored document."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder, GGUF file or hub id. By default what the document was read by.",
            callback=options.named,
        ),
    ] = None
    dtype: Annotated[str | None, typer.Option(help="By default what the document was read in.")] = None


@dataclass(frozen=True)
class Reading:
    """Everything a rank needs to read a document and store it; plain values, so that it travels."""

    text: str
    questions: list[str]
    chat_template: str | None
    out: str
    loading: dict[str, Any]
    reading: dict[str, Any]
    as_json: bool


@dataclass(frozen=True)
class Asking:
    """Everything a rank needs to answer questions about a stored document."""

    store: str
    queries: list[str]
    verify: bool
    loading: dict[str, Any]
    reading: dict[str, Any]
    sampling: dict[str, Any]
    reread: str
    as_json: bool


@expanded
def read(
    *,
    document: options.Document,
    out: Annotated[
        str,
        typer.Option(
            help="Folder to write; what is in it already is replaced once this is whole.",
            metavar="PATH",
            callback=options.folder_named,
        ),
    ],
    question: Annotated[
        list[str] | None, typer.Option(help="What it will be asked, if that is known; repeat it for typical questions.")
    ] = None,
    model: options.RemoteModel,
    reading: options.Reading,
    ranks: options.Ranks,
    chat_template: options.ChatTemplate = None,
    as_json: options.AsJson = False,
) -> None:
    """Read a document and keep it on disk, to be asked with apb ask."""
    options.check_folder(Path(out))
    if any(not each.strip() for each in question or ()):
        raise InputError("The question is empty; give one, or leave --question out.")
    text = read_document(document)

    from .checks import check_reading

    place, checked = check_reading(model, ranks, reading)

    from ..asking import NO_QUESTION
    from ..distributed import launch

    if checked.propagation is not None and not question:
        raise InputError(NO_QUESTION)
    request = Reading(text, question or [], chat_template, out, place.loading, values(reading), as_json)
    launch.run(_read, place.processes, request)


def _read(request: Reading) -> None:
    """One rank's part of reading; rank 0 prints."""
    from .quiet import quiet_libraries

    quiet_libraries()

    from ..distributed import launch
    from ..engine import Engine
    from ..manifest import manifest_of
    from .progress import Bar

    engine = Engine.from_pretrained(**request.loading, **request.reading)
    prints = engine.mesh.everyone.rank == 0
    one = request.questions[0] if len(request.questions) == 1 else None
    with Bar("Reading", "token", shown=prints) as progress:
        document = engine.read(
            request.text,
            question=one,
            questions=[] if one else request.questions,
            chat_template=request.chat_template,
            planned=progress.begin if progress.on_terminal and not request.as_json else None,
            progress=progress.update,
        )
    document.save(request.out)
    launch.leave()
    if prints:
        summary = summary_of(Path(request.out), manifest_of(Path(request.out)))
        if request.as_json:
            print(json.dumps(summary))
        else:
            print(f"apb: {request.out}: {told(summary)}", file=sys.stderr)


@expanded
def ask(
    *,
    store: Store,
    query: Annotated[
        list[str] | None, typer.Option(help="A question; repeatable. If left out they are read from standard input.")
    ] = None,
    model: StoredModel,
    ranks: options.Ranks,
    decode: options.Decoding,
    sampling: options.Sampling,
    reread: Annotated[
        str,
        typer.Option(help="auto: read the text anew for a question where it was read for another one, not exactly."),
    ] = "never",
    verify: Annotated[bool, typer.Option(help="Compare the checksums of the files.")] = True,
    allow_extrapolation: options.AllowExtrapolation = False,
    as_json: options.AsJson = False,
) -> None:
    """Ask a document that apb read has kept; each question reads its own rows alone."""
    from ..manifest import manifest_of

    manifest = manifest_of(store)
    model = _of_store(model, store, manifest)

    from ..asking import check_reread
    from ..decoding import make_decoding
    from ..distributed import launch
    from ..generation import Sampling
    from .checks import check

    Sampling(**values(sampling))
    make_decoding(decode.decoding, decode.options)
    check_reread(reread)
    place = check(model, ranks)
    if query is None and place.processes > 1:
        raise InputError("Questions are read from standard input on one rank only; give them with --query.")
    how = {"strategy": manifest["strategy"], "allow_extrapolation": allow_extrapolation, **values(decode)}
    request = Asking(str(store), query or [], verify, place.loading, how, values(sampling), reread, as_json)
    launch.run(_ask, place.processes, request)


def _of_store(model: StoredModel, store: Path, manifest: dict[str, Any]) -> StoredModel:
    """The model that was asked for, else the one that a document was read by; InputError if that is not there."""
    if model.dtype is None:
        model = replace(model, dtype=manifest["dtype"])
    if model.model is not None:
        return model
    try:
        model = replace(model, model=manifest["model"]["name"])
        model.config()  # a folder that has gone may look like an id of the hub
    except InputError as error:
        raise InputError(
            f"{str(error).rstrip('.')}; the document in {str(store)!r} names it: give its place with --model PATH."
        ) from error
    return model


def _ask(request: Asking) -> None:
    """One rank's part of the answers; rank 0 prints."""
    from .quiet import quiet_libraries

    quiet_libraries()

    from ..distributed import launch
    from ..engine import Engine

    engine = Engine.from_pretrained(**request.loading, **request.reading)
    prints = engine.mesh.everyone.rank == 0
    document = engine.load(request.store, verify=request.verify)
    answers = []
    for query in request.queries or _typed():
        text = document.stream(query, reread=request.reread, **request.sampling)
        answers.append(printed(text, prints and not request.as_json))
        if prints and not request.as_json:
            print(flush=True)
            answer = answers[-1]
            kind = "exact" if answer.exact else "approximate"
            print(
                f"apb: {answer.strategy} ({kind}), read for {answer.read_for}; the question took "
                f"{answer.timing['prefill_s']:.2f} s{attended(answer)}",
                file=sys.stderr,
            )
    launch.leave()
    if not answers:
        raise InputError("No question was given; give --query, or questions on standard input, a line each.")
    if prints and request.as_json:
        found = [answer.to_dict() for answer in answers]
        print(json.dumps(found[0] if len(found) == 1 else found))


def _typed() -> Iterator[str]:
    """Questions from standard input, a line each; a terminal is shown where to type."""
    while True:
        if sys.stdin.isatty():
            print("? ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def documents(
    store: Annotated[Path, typer.Argument(help="A document's folder, or a folder of such folders.")],
    as_json: options.AsJson = False,
) -> None:
    """List the documents of a folder: their sizes, and what they were read by and for."""
    from ..manifest import documents as found_in

    found = [summary_of(path, manifest) for path, manifest in found_in(store)]
    if as_json:
        print(json.dumps(found))
        return
    if not found:
        raise InputError(f"There is no document in {str(store)!r}; apb read --out FOLDER writes one.")
    for each in found:
        print(f"{each['store']}: {told(each)}")


def summary_of(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What is told of a document."""
    kept = ("created", "apb", "dtype", "tokens", "tokens_sha256")
    how = ("strategy", "options", "propagation", "exact", "compressor", "read_for", "index", "index_s")
    size = sum(shard["bytes"] for shard in manifest["shards"])
    return {
        "store": str(folder),
        "model": manifest["model"]["name"],
        "fingerprint": manifest["model"]["fingerprint"],
        **{name: manifest.get(name) for name in (*kept, *how)},
        "ranks": len(manifest["shards"]),
        "bytes": size,
        "prefill_s": manifest["prefill_s"],
    }


def told(summary: dict[str, Any]) -> str:
    """A summary in words."""
    exact = "exact" if summary["exact"] else "approximate"
    if summary["propagation"]:
        exact += ", {rows:,} rows above layer {layer}".format(**summary["propagation"])
    index = (
        ""
        if not summary["index"]
        else f", its index of {' of '.join(map(str, summary['index']))} in {summary['index_s']:.2f} s"
    )
    wanted = [each if isinstance(each, str) else "tokens" for each in summary["read_for"]]
    ranks = f"{summary['ranks']} rank{'s' * (summary['ranks'] > 1)}"
    return (
        f"{summary['tokens']:,} tokens, {summary['bytes'] / 2**20:,.1f} MiB on {ranks}, by "
        f"{summary['strategy']} ({exact}) in {summary['prefill_s']:.2f} s{index}, for "
        f"{', '.join(map(repr, wanted)) if wanted else 'no question'}; {summary['model']}, {summary['dtype']}, "
        f"{summary['created']}"
    )
