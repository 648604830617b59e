"""``apb explain``: the passages of a document that the blocks passed on for a question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import at_least
from . import options
from .generate import read_document
from .groups import expanded, values
from .tables import console

if TYPE_CHECKING:
    from ..foresight import Foresight


@expanded
def explain(
    *,
    document: options.Document,
    query: options.Query,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("explain.html"),
    model: options.Model,
    strategy: Annotated[
        str, typer.Option(help="How the document is read: apb, the one in which blocks pass tokens on.")
    ] = "apb",
    chosen: options.Options,
    propagation: options.Propagate = "off",
    max_new_tokens: options.MaxNewTokens = 64,
) -> None:
    """Read a document for a question and write a page (HTML) that shows which passages the blocks passed on."""
    text = read_document(document)
    at_least("--max-new-tokens", max_new_tokens, 1)
    options.check_out(out)
    decode = options.Decoding(options={})
    how = options.Reading(strategy=strategy, options=chosen, decode=decode, propagation=propagation)

    from .checks import check_reading

    place, reading = check_reading(model, options.Ranks(), how)

    from ..engine import Engine
    from ..explanation import check_passes
    from ..explanation import explain as explain_prompt
    from ..prompt import Prompt
    from .progress import Bar

    check_passes(reading.methods)
    engine = Engine.from_pretrained(**place.loading, **values(how))
    assert engine.tokenizer is not None, "from_pretrained loads one"
    prompt = Prompt.for_model(engine.tokenizer, text, query)
    with Bar("Reading", "token") as bar:
        bar.begin(engine.plan(prompt, max_new_tokens))
        explanation = explain_prompt(engine, prompt, query, max_new_tokens, bar.update)
    out.write_text(explanation.to_html(), encoding="utf-8")
    print(f"apb: wrote {out}", file=sys.stderr)
    _print(explanation.foresight)


def _print(foresight: Foresight) -> None:
    """What propagation would keep, if it was not on."""
    rows = foresight.table()
    if not rows:
        return
    from rich.table import Table

    from ..foresight import KEPT

    title = "The question's attention to the document in later layers: what --propagate SHARE@LAYER would keep of it"
    table = Table("layer", *(f"share {keep:g}" for keep in KEPT), title=title)
    for layer, shares in rows:
        table.add_row(str(layer), *(f"{share:.1%}" for share in shares))
    console().print(table)
