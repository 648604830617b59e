"""``apb demo``: a question about a long document, with apb and with full attention beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import options
from .generate import read_document

if TYPE_CHECKING:
    from ..engine import Engine
    from ..generation import Generation
    from ..prompt import Prompt

DOCUMENT_TOKENS = 33_000
# Of the generated text: on one device smaller blocks and fewer passed pairs mean less computation.
GENERATED: dict[str, Any] = {"blocks": 16, "passing_length": 64}
SEED = 2025
# Characters of the longest bar.
_WIDTH = 40


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
    apb = Engine.from_pretrained(shipped_model(), strategy="apb", **(GENERATED if document is None else {}))
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
    print(f"Answer:   {fast.text.strip()}\n")
    results = [fast.to_dict(), exact.to_dict()]
    print("\n".join(bars(*results)))
    ratio = exact.timing["prefill_s"] / fast.timing["prefill_s"]
    if out is not None:
        report = {"command": options.typed(), "query": query, "expected": expected, "ratio": ratio, "results": results}
        out.write_text(json.dumps(report, indent=1) + "\n")
    if expected is not None:
        right = expected in fast.text
        print(f"The document says {expected}: apb's answer is {'right' if right else 'WRONG'}.")
        raise typer.Exit(not right)


def bars(fast: dict[str, Any], exact: dict[str, Any]) -> list[str]:
    """The time that each of two results took to be read, as a bar and a number: a line each, the exact one first."""
    same = fast["text"].strip() == exact["text"].strip()
    other = "the same answer" if same else f"where full attention answers {exact['text'].strip()!r}"
    cut = "exact as well: so short a text is not cut" if fast["exact"] else f"{fast['plan']['blocks']} blocks"
    notes = {exact["strategy"]: "exact", fast["strategy"]: f"{cut}, {other}"}
    seconds = {each["strategy"]: each["timing"]["prefill_s"] for each in (exact, fast)}
    lines = []
    for name, took in seconds.items():
        bar = "#" * round(_WIDTH * took / max(seconds.values()))
        lines.append(f"{name:<4} {bar:<{_WIDTH}} {took:.{1 if took >= 10 else 2}f} s   {notes[name]}")
    return lines


def _answer(engine: Engine, prompt: Prompt) -> Generation:
    """Read and answer, with a progress bar."""
    from .progress import Bar

    plan = engine.plan(prompt)
    with Bar(f"{plan.strategy:>4}: reading", "token") as bar:
        bar.begin(plan)
        return engine.generate(prompt, max_new_tokens=32, progress=bar.update)
