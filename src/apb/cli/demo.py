"""``apb demo``: a question about a long document, with apb and with full attention beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from . import options
from .generate import read_document

if TYPE_CHECKING:
    from ..engine import Engine
    from ..generation import Generation
    from ..prompt import Prompt

DOCUMENT_TOKENS = 33_000
# On one device smaller blocks and fewer passed pairs mean less computation.
BLOCKS = 16
PASSING_LENGTH = 64
SEED = 2025


def demo(
    document: Annotated[
        str | None, typer.Option(help="Text file to read, - for standard input. By default one is generated.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="The question; needed with --document.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write both results there, as JSON.")] = None,
) -> None:
    """Ask the shipped model about a long text, with apb and with full attention; needs no download and no GPU.

    The generated text has 65 facts of one kind, and the question is about one of them; with a wrong answer to that the
    exit status is 1.
    """
    if (document is None) != (query is None):
        raise InputError("--document and --query go together: give both, or neither.")
    if out is not None:
        options.check_out(out)
    text = None if document is None else read_document(document)

    from ..engine import Engine
    from ..evaluation.tasks import generate
    from ..hf.loading import shipped_model
    from ..prompt import Prompt
    from .quiet import quiet_libraries

    quiet_libraries()
    apb = Engine.from_pretrained(shipped_model(), strategy="apb", blocks=BLOCKS, passing_length=PASSING_LENGTH)
    tokenizer = apb.needed_tokenizer()
    expected = None
    if document is None:
        sample = generate("multikey", tokenizer, DOCUMENT_TOKENS, SEED, haystack="prose")
        text, query, expected = sample.document, sample.query, sample.answer
        source = "a generated text with 65 hidden facts"
    else:
        source = "standard input" if document == "-" else Path(document).name
    assert text is not None and query is not None
    prompt = Prompt.for_model(tokenizer, text, query)
    print(f"Model:    {shipped_model().name} on {apb.device}, {str(apb.dtype).removeprefix('torch.')}")
    print(f"Document: {source}, {len(prompt.document):,} tokens")
    print(f"Question: {query}", flush=True)
    fast = _answer(apb, prompt)
    exact = _answer(Engine.from_model(apb.model, tokenizer, strategy="full"), prompt)
    print()
    for result, note in ((fast, f"{fast.plan['blocks']} blocks, approximate"), (exact, "exact")):
        seconds = result.timing["prefill_s"]
        print(f"{result.strategy:>4}: read in {seconds:6.2f} s ({note}), answer:{' ' + result.text.strip()}")
    ratio = exact.timing["prefill_s"] / fast.timing["prefill_s"]
    print(f"Full attention took {ratio:.1f} times as long to read it.")
    if out is not None:
        results = [fast.to_dict(), exact.to_dict()]
        report = {"command": options.typed(), "query": query, "expected": expected, "ratio": ratio, "results": results}
        out.write_text(json.dumps(report, indent=1) + "\n")
    if expected is not None:
        right = expected in fast.text
        print(f"The document says {expected}: apb's answer is {'right' if right else 'WRONG'}.")
        raise typer.Exit(not right)


def _answer(engine: Engine, prompt: Prompt) -> Generation:
    """Read and answer, with a progress bar."""
    from .progress import Bar

    plan = engine.plan(prompt)
    with Bar(f"{plan.strategy:>4}: reading", "token") as bar:
        bar.begin(plan)
        return engine.generate(prompt, max_new_tokens=32, progress=bar.update)
