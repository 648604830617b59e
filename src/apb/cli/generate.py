"""``apb generate``: ask a question of a document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import options
from .groups import expanded, values

if TYPE_CHECKING:
    from ..generation import Generation
    from ..prompt import Prompt
    from ..reading import Reading
    from .checks import Place


@dataclass(frozen=True)
class Request:
    """Everything a rank needs to answer, checked before any process starts; plain values, so that it travels."""

    prompt: Prompt
    loading: dict[str, Any]
    reading: dict[str, Any]
    sampling: dict[str, Any]
    as_json: bool


@expanded
def generate(
    document: options.Document,
    query: options.Query,
    model: options.RemoteModel,
    reading: options.Reading,
    ranks: options.Ranks,
    chat_template: options.ChatTemplate = None,
    *,
    sampling: options.Sampling,
    as_json: options.AsJson = False,
) -> None:
    """Ask a question of a document. The answer goes to standard output, progress and notes to standard error."""
    text = read_document(document)

    from .checks import check_reading

    place, checked = check_reading(model, ranks, reading)

    from ..distributed import launch
    from ..generation import Sampling

    Sampling(**values(sampling))
    request = Request(
        prompt=_prompt(text, query, chat_template, place, checked, sampling.max_new_tokens),
        loading=place.loading,
        reading=values(reading),
        sampling=values(sampling),
        as_json=as_json,
    )
    launch.run(answer, place.processes, request)


def read_document(path: str) -> str:
    """The text of a file, or of standard input for ``-``."""
    if not path:
        raise InputError("An empty name was given for the document; name a text file, or - for standard input.")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"The document {path!r} cannot be read: {error.strerror}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The document {path!r} is not UTF-8 text: byte {error.start} cannot be decoded; convert it to UTF-8 first."
        ) from error
    if "\0" in text:
        raise InputError(f"The document {path!r} holds NUL bytes, so it is no text; convert it to UTF-8 text first.")
    return text


def answer(request: Request) -> None:
    """One rank's part of an answer; rank 0 prints."""
    from .quiet import quiet_libraries

    quiet_libraries()

    from ..distributed import launch
    from ..engine import Engine
    from .progress import Bar

    engine = Engine.from_pretrained(**request.loading, **request.reading)
    prints = engine.mesh.everyone.rank == 0
    with Bar("Reading", "token", shown=prints) as progress:
        if progress.on_terminal and not request.as_json:
            progress.begin(engine.plan(request.prompt, request.sampling["max_new_tokens"]))
        pieces = engine.stream(request.prompt, progress=progress.update, **request.sampling)
        result = printed(pieces, prints and not request.as_json, progress.close)
    launch.leave()
    if not prints:
        return
    if request.as_json:
        print(json.dumps(result.to_dict()))
        return
    print(flush=True)
    kind = "exact" if result.exact else "approximate"
    if result.choice:
        print(f"apb: chose {result.strategy}: {result.choice}", file=sys.stderr)
    for note in result.notes:
        print(f"apb: {note}", file=sys.stderr)
    blocks, ranks = result.plan["blocks"], result.plan["ranks"]
    print(
        f"apb: {result.strategy} ({kind}), {blocks} block{'s' * (blocks > 1)} on {ranks} rank{'s' * (ranks > 1)}: "
        f"read {result.prompt_tokens} tokens in {result.timing['prefill_s']:.2f} s, "
        f"answered at {result.timing['decode_tokens_per_s']:.1f} tokens/s{attended(result)}",
        file=sys.stderr,
    )


def attended(result: Generation) -> str:
    """What an answer's tokens attended to, in words; nothing if that is everything."""
    share = result.decode["share"]
    return "" if share >= 1 else f", {result.decode['method']}: tokens attended to {share:.1%} of the keys"


def printed(
    pieces: Generator[str, None, Generation], shown: bool, first: Callable[[], None] = lambda: None
) -> Generation:
    """The result of a stream, its pieces printed as they come if ``shown``; ``first`` is called before each."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return stop.value
        first()
        if shown:
            print(piece, end="", flush=True)


def _prompt(text: str, query: str, template: str | None, place: Place, reading: Reading, new_tokens: int) -> Prompt:
    """The prompt, which all ranks use; InputError if it cannot be read, or leaves no room for the answer."""
    from ..hardware import Hardware
    from ..hf import counting, loading
    from ..prompt import Prompt

    tokenizer = loading.load_tokenizer(place.model.name, place.loading["trust_remote_code"])
    prompt = Prompt.for_model(tokenizer, text, query, chat_template=template)
    split = counting.model_shape(place.config, place.gpus_per_rank).split
    hardware = Hardware.of(place.device, place.dtype, place.processes)
    shared = place.tensor_parallel, split, prompt.asked
    reading.plan(reading.lengths(prompt), place.ranks, place.config, hardware, new_tokens, *shared)
    return prompt
