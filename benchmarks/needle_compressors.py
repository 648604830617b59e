"""Accuracy cost of selection on the shipped model: compressors, passing lengths, blocks, anchors, late questions.

    python benchmarks/needle_compressors.py --jobs 28 --samples 204 --part needed --out needed.json
    python benchmarks/needle_compressors.py --jobs 28 --samples 204 --part study --out study.json
    python benchmarks/needle_compressors.py --tables needed.json study.json --page docs/compressors.md

The first two measure and write JSON; the last writes the tables between the markers of the page.
Candidates that are not in the package are defined here, like its compressors: scores of a block's tokens.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from needle_cells import Cell, arguments_of, measure
from torch import Tensor

from apb.compressors import BlockView, Query, Retaining, make_compressor
from apb.engine import Engine
from apb.evaluation.synthetic import Setting
from apb.hf.heads import HeadShape, load_heads
from apb.hf.loading import load_config, shipped_model
from apb.kernels.selection import pool
from apb.methods import APB, Full
from apb.planning.plan import Plan, Tokens
from apb.prompt import Prompt
from apb.session import Session

LENGTH, LONG, BLOCKS = 16384, 32768, 8
NEEDLES = ("single", "multikey", "multivalue", "multiquery", "variable_tracking")
HEADS = "APB_STUDY_HEADS"  # passes the heads file to the processes of a run
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


# --- candidates ----------------------------------------------------------------------------------------------------


def attention_of(view: BlockView) -> Tensor:
    """softmax(q k^T) of the query rows over the block: (kv_heads, rows * group, tokens)."""
    kv_heads = view.k.shape[1]
    grouped = view.query.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    return ((grouped @ view.k.permute(1, 2, 0)).float() * view.scale).softmax(-1)


class QueryMax(Query):
    """Maximum over query rows and the group's heads instead of their mean."""

    name = "query, max over rows"

    def score(self, view: BlockView) -> Tensor:
        return attention_of(view).amax(1)


class QueryValues(Query):
    """Mean attention times the norm of the value."""

    name = "query, times value norm"

    def score(self, view: BlockView) -> Tensor:
        return attention_of(view).mean(1) * view.v.float().norm(dim=2).T


class QueryUnpooled(Query):
    """Mean attention without max-pooling."""

    name = "query, not pooled"
    pooled = False

    def score(self, view: BlockView) -> Tensor:
        return attention_of(view).mean(1)


class HeadsAndQuery(Query):
    """The better of a token's two ranks: about half of the passed pairs are chosen by heads, half by query rows."""

    name = "heads and query"
    needs_before_rope = True
    pooled = False

    def score(self, view: BlockView) -> Tensor:
        both = (heads_for(view.k.dtype, view.k.device).score(view), super().score(view))
        return torch.stack([pool(scores).argsort(1).argsort(1).float() for scores in both]).amax(0)


@cache
def heads_for(dtype: torch.dtype, device: torch.device) -> Retaining:
    shape = HeadShape.of(load_config(shipped_model()))
    heads = load_heads(os.environ[HEADS], **asdict(shape), dtype=dtype, devices=[device] * shape.layers)
    return Retaining(heads)


CANDIDATES = (QueryMax, QueryValues, QueryUnpooled, HeadsAndQuery)


# --- other readings ------------------------------------------------------------------------------------------------


class PlainAnchor(APB):
    """APB with an anchor without the question: prefix and first document tokens only."""

    def anchored(self, plan: Plan) -> int:
        return plan.anchor_length

    def anchor_tokens(self, plan: Plan, prefix: Tokens, document: Tokens, query: Tokens) -> Tokens:
        return prefix + document


class AskedAfter(Engine):
    """Reads the document alone, with its last tokens as the query, and then the question, exactly."""

    rows = 32

    def prefill(self, prompt: Prompt, *, max_new_tokens: int = 1, **options: Any) -> Session:
        before = Prompt(prompt.prefix, prompt.document[: -self.rows], prompt.document[-self.rows :])
        session = super().prefill(before, max_new_tokens=max_new_tokens + len(prompt.query), **options)
        session.extend(prompt.query)
        return session


@dataclass(frozen=True)
class Variant(Setting):
    """A setting in which the question may be asked after the document has been read."""

    asked_after: bool = False

    def engine(self, engine: Engine) -> Engine:
        kind = AskedAfter if self.asked_after else Engine
        return kind.from_model(
            engine.model,
            engine.tokenizer,
            fused=engine.fused,
            strategy=self.method,
            compressor=self.compressor,
            verify=False,
        )


# --- the cells -----------------------------------------------------------------------------------------------------


def variant(compressor: str, length: int, blocks: int = BLOCKS, share: int = 8, reader: str = "") -> Variant:
    """l_p = block / share; share 0 passes nothing."""
    kind = PlainAnchor if reader in ("plain anchor", "asked after") else APB
    passing = length // blocks // share if share else 0
    method = kind(blocks=blocks, anchor_length=0 if reader == "no anchor" else None, passing_length=passing)
    scorers = {each.name: each() for each in CANDIDATES} | {"retaining": Retaining(os.environ[HEADS])}
    return Variant(method, scorers.get(compressor) or make_compressor(compressor), asked_after=reader == "asked after")


def needed() -> list[Cell]:
    """Cells of 8 blocks at 32K on every kind of question."""
    cells = []
    for task in (*NEEDLES, "headings"):
        cells.append(Cell(task, LONG, "full", Variant(Full())))
        for name, share in product(("query-edge", "query", "retaining"), (8, 32)):
            cells.append(Cell(task, LONG, f"{name}, 1/{share}", variant(name, LONG, share=share)))
    for name in ("recent", "random"):
        cells.append(Cell("headings", LONG, f"{name}, 1/8", variant(name, LONG)))
    cells.append(Cell("headings", LONG, "nothing passed", variant("query", LONG, share=0)))
    return cells


def study() -> list[Cell]:
    """Cells of the ablations, at 16K on the kind of question that needs earlier blocks."""
    found: dict[tuple[str, str], Variant] = {}

    def add(task: str, name: str, **options: Any) -> None:
        found[task, name] = variant(length=LENGTH, **options)

    every = (4, 8, 16, 32, 64, 128, 256)
    shares: dict[str, tuple[int, ...]] = dict.fromkeys(("query-edge", "query", "retaining"), every)
    shares |= {"random": (4, 8, 16, 32, 64), "recent": (8, 32)} | {kind.name: (32, 128, 256) for kind in CANDIDATES}
    for name, each in shares.items():
        for share in each:
            add("headings", f"{name}, 1/{share}", compressor=name, share=share)
    for blocks in (2, 4, 16, 32):
        for name in ("query-edge", "query", "retaining", "random"):
            add("headings", f"{name}, {blocks} blocks", compressor=name, blocks=blocks)
        add("headings", f"nothing passed, {blocks} blocks", compressor="query", blocks=blocks, share=0)
    add("headings", "nothing passed", compressor="query", share=0)
    for reader in ("plain anchor", "no anchor"):
        for name in ("query-edge", "query", "retaining"):
            add("headings", f"{name}, {reader}", compressor=name, reader=reader)
        add("headings", f"nothing passed, {reader}", compressor="query", share=0, reader=reader)
    for task in ("headings", "multikey"):
        for name in ("query", "retaining", "random"):
            for share in (8, 32):
                add(task, f"{name}, 1/{share}, asked after", compressor=name, share=share, reader="asked after")
        add(task, "nothing passed, asked after", compressor="query", share=0, reader="asked after")
    return [Cell(task, LENGTH, name, setting) for (task, name), setting in found.items()]


# --- the tables ----------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]]) -> str:
    """All results as Markdown tables: percent of right answers, with 95 % intervals."""
    found = {(row["task"], row["length"], row["setting"]): row for row in rows}

    def figure(name: str, task: str = "headings", length: int = LENGTH) -> str:
        row = found.get((task, length, name))
        return f"{row['score']:.1f} ({row['interval'][0]:.0f}-{row['interval'][1]:.0f})" if row else ""

    def table(head: list[str], body: list[list[str]]) -> str:
        lines = [head, ["---"] * len(head), *(line for line in body if any(line[1:]))]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    tasks = (*NEEDLES, "headings")
    names = ["full"]
    names += [f"{name}, 1/{share}" for name, share in product(("query-edge", "query", "retaining"), (8, 32))]
    names += ["recent, 1/8", "random, 1/8", "nothing passed"]
    shares = ("4", "8", "16", "32", "64", "128", "256")
    compressors = ["query-edge", "query", "retaining", *(kind.name for kind in CANDIDATES), "random", "recent"]
    counts = (2, 4, 8, 16, 32)
    ways = {"": "anchor with the question", "plain anchor": "anchor without it", "no anchor": "no anchor"}

    def of_blocks(name: str, count: int) -> str:
        at_default = name if name == "nothing passed" else f"{name}, 1/8"
        return figure(at_default if count == BLOCKS else f"{name}, {count} blocks")

    def of_anchor(name: str, way: str) -> str:
        at_default = name if name == "nothing passed" else f"{name}, 1/8"
        return figure(f"{name}, {way}" if way else at_default)

    late = [f"{name}, 1/{share}, asked after" for name in ("query", "retaining", "random") for share in (8, 32)]
    passing = ["query-edge", "query", "retaining", "random", "nothing passed"]
    return "\n\n".join(
        [
            "### 32K tokens, 8 blocks, every kind of question",
            table(["", *(f"`{task}`" for task in tasks)], [[n, *(figure(n, t, LONG) for t in tasks)] for n in names]),
            "### Passing length, as a share of a block",
            table(
                ["`headings`, 16K, 8 blocks", *(f"1/{share}" for share in shares)],
                [[name, *(figure(f"{name}, 1/{share}") for share in shares)] for name in compressors],
            ),
            "### Number of blocks, passing 1/8 of a block",
            table(
                ["`headings`, 16K", *(str(count) for count in counts)],
                [[name, *(of_blocks(name, count) for count in counts)] for name in passing],
            ),
            "### Anchor",
            table(
                ["`headings`, 16K, 8 blocks", *ways.values()],
                [[name, *(of_anchor(name, way) for way in ways)] for name in passing],
            ),
            "### Questions asked after prefill",
            table(
                ["16K, 8 blocks", "`headings`", "`multikey`"],
                [
                    [name.removesuffix(", asked after"), figure(name), figure(name, "multikey")]
                    for name in (*late, "nothing passed, asked after")
                ],
            ),
        ]
    )


def main() -> None:
    arguments = arguments_of(
        __doc__,
        heads={"type": Path, "default": shipped_model() / "heads.safetensors"},
        part={"choices": ["needed", "study", "all"], "default": "all"},
        page={"type": Path, "help": "Markdown file whose tables are to be replaced"},
        tables={"type": Path, "nargs": "+", "help": "measure nothing: tables from these files"},
    )
    os.environ[HEADS] = str(arguments.heads.resolve())
    if not (arguments.tables or arguments.out):
        raise SystemExit("give --out to measure, or --tables with files that were measured")
    if arguments.tables:
        results = [row for path in arguments.tables for row in json.loads(path.read_text())["results"]]
    else:
        parts = {"needed": needed(), "study": study(), "all": needed() + study()}
        results = measure(parts[arguments.part], arguments)
    text = tables(results)
    print(text)
    if arguments.page:
        before, _, rest = arguments.page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        arguments.page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
