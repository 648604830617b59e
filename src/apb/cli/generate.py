"""``apb generate``: ask a question of a document."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, at_least
from . import options

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..prompt import Prompt


@dataclass(frozen=True)
class Request:
    """Everything a rank needs to answer, checked before any process starts; plain values, so that it travels."""

    model: str
    document: str
    query: str
    chat_template: str | None
    loading: dict[str, Any]
    reading: dict[str, Any]
    sampling: dict[str, Any]
    as_json: bool

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """What the model reads."""
        from ..prompt import Prompt

        return Prompt.for_model(tokenizer, self.document, self.query, chat_template=self.chat_template)


def generate(
    document: Annotated[str, typer.Option(help="Text file to read, or - for standard input.")],
    query: Annotated[str, typer.Option(help="The question.")],
    model: options.Model = None,
    chat_template: options.ChatTemplate = None,
    strategy: options.Strategy = "apb",
    blocks: options.Blocks = None,
    rounds: options.Rounds = None,
    ranks: options.Ranks = None,
    tensor_parallel: options.TensorParallel = 1,
    gpus_per_rank: options.GpusPerRank = 1,
    anchor_length: options.AnchorLength = None,
    passing_length: options.PassingLength = None,
    compressor: options.Compressor = None,
    heads: options.Heads = None,
    vertical_size: options.VerticalSize = None,
    slash_size: options.SlashSize = None,
    approximate: options.Approximate = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="With a temperature: draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="With a temperature: draw from the likeliest tokens that together hold p.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws: the same seed gives the same text.")] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    allow_extrapolation: options.AllowExtrapolation = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Ask a question of a document. The answer goes to standard output, progress and notes to standard error."""
    given = dict(locals())
    text = read_document(document)

    from ..distributed import launch
    from ..generation import Sampling
    from ..hf import loading
    from .quiet import quiet_libraries

    quiet_libraries()
    place = loading.pick_device(device)
    at_least("tensor-parallel", tensor_parallel, 1)
    size = launch.ranks_to_use(ranks, place, tensor_parallel, gpus_per_rank)
    request = Request(
        model=str(model or loading.shipped_model()),
        document=text,
        query=query,
        chat_template=chat_template,
        **options.of_engine(given, place.type),
        sampling={
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        },
        as_json=as_json,
    )
    Sampling(**request.sampling)
    _check(request, size, place)
    launch.run(answer, size * tensor_parallel, request)


def read_document(path: str) -> str:
    """The text of a file, or of standard input for ``-``."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"The document {path!r} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The document {path!r} is not UTF-8 text: byte {error.start} cannot be decoded; convert it to UTF-8 first."
        ) from error


def answer(request: Request) -> None:
    """One rank's part of an answer; rank 0 prints."""
    from ..distributed import launch
    from ..engine import Engine
    from .progress import Bar
    from .quiet import quiet_libraries

    quiet_libraries()
    engine = Engine.from_pretrained(request.model, **request.loading, **request.reading)
    prints = engine.mesh.everyone.rank == 0
    assert engine.tokenizer is not None, "from_pretrained loads one"
    prompt = request.prompt(engine.tokenizer)
    with Bar("Reading", "token", shown=prints) as progress:
        pieces = engine.stream(prompt, progress=progress.update, **request.sampling)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as stop:
                result = stop.value
                break
            progress.close()
            if prints and not request.as_json:
                print(piece, end="", flush=True)
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
    print(
        f"apb: {result.strategy} ({kind}), {result.plan['blocks']} blocks on {result.plan['ranks']} ranks: "
        f"read {len(prompt)} tokens in {result.timing['prefill_s']:.2f} s, "
        f"answered at {result.timing['decode_tokens_per_s']:.1f} tokens/s",
        file=sys.stderr,
    )


def _check(request: Request, ranks: int, device: torch.device) -> None:
    """Everything that can be wrong with a request, before a process is started or a weight is read."""
    from ..hardware import Hardware
    from ..hf import counting, loading
    from ..hf.heads import HeadShape, load_heads
    from ..hf.tensor_parallel import check_shards
    from ..reading import Reading

    reading = Reading(**request.reading)
    dtype = loading.pick_dtype(request.loading["dtype"], device)
    remote_code = request.loading["trust_remote_code"]
    config = loading.load_config(request.model, remote_code)
    loading.check_supported(config)
    prompt = request.prompt(loading.load_tokenizer(request.model, remote_code))
    tensor = request.loading["tensor_parallel"]
    check_shards(config, tensor)
    split = counting.model_shape(config, request.loading["gpus_per_rank"]).split
    hardware = Hardware.of(device, dtype, ranks * tensor)
    reading.plan(prompt, ranks, config, hardware, request.sampling["max_new_tokens"], tensor, split)
    if reading.heads:
        load_heads(reading.heads, **asdict(HeadShape.of(config)))
