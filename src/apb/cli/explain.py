"""``apb explain``: which passages of a document the blocks passed on for a question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import at_least
from . import options
from .generate import read_document


def explain(
    document: Annotated[str, typer.Option(help="Text file to read, or - for standard input.")],
    query: Annotated[str, typer.Option(help="The question.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("explain.html"),
    model: options.Model = None,
    strategy: Annotated[
        str, typer.Option(help="How the document is read: apb, the one in which blocks pass tokens on.")
    ] = "apb",
    blocks: options.Blocks = None,
    anchor_length: options.AnchorLength = None,
    passing_length: options.PassingLength = None,
    compressor: options.Compressor = None,
    heads: options.Heads = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Read a document for a question and write a page (HTML) that shows which passages the blocks passed on."""
    text = read_document(document)

    from ..engine import Engine
    from ..explanation import check_passes
    from ..explanation import explain as explain_prompt
    from ..hf import loading
    from ..prompt import Prompt
    from ..reading import Reading
    from .progress import Bar
    from .quiet import quiet_libraries

    quiet_libraries()
    check_passes(Reading.of(strategy).methods)
    at_least("max_new_tokens", max_new_tokens, 1)
    options.check_out(out)
    engine = Engine.from_pretrained(
        model or loading.shipped_model(),
        dtype=dtype,
        device=device,
        strategy=strategy,
        blocks=blocks,
        anchor_length=anchor_length,
        passing_length=passing_length,
        compressor=compressor,
        heads=heads,
    )
    assert engine.tokenizer is not None, "from_pretrained loads one"
    prompt = Prompt.for_model(engine.tokenizer, text, query)
    with Bar("Reading", "token") as bar:
        explanation = explain_prompt(engine, prompt, query, max_new_tokens, bar.update)
    out.write_text(explanation.to_html(), encoding="utf-8")
    print(f"apb: wrote {out}", file=sys.stderr)
