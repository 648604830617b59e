"""The tokens that each block of an approximate prefill passed on, by layer and KV head, and as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .detokenizing import Detokenizer
from .engine import Engine
from .errors import InputError
from .foresight import Foresight
from .generation import Sampling, decode
from .hf.loading import why_all_rows
from .passes.prefill import Progress
from .planning.methods import METHODS, Method
from .planning.plan import Plan
from .prompt import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Number of most often chosen passages listed per block, and the longest gap in tokens inside one.
_LISTED, GAP = 3, 4


@dataclass(frozen=True)
class Explanation:
    """The plan, the answer and the passed tokens of one prompt.

    Attributes:
        plan: the plan that the prompt was read by.
        compressor: name of the compressor that chose the tokens.
        query, answer: as text.
        pieces: the text of each token of prefix and document, at its true position.
        chosen: (layers, kv_heads, prefix + document tokens) bool, on the CPU: passed on to later blocks; with
            propagation of the layers that read all tokens.
        went_on: with propagation the positions of the tokens that went through the other layers.
        foresight: without propagation, how much of later layers' attention it would keep; empty for models that are
            not read with it.
    """

    plan: Plan
    compressor: str
    query: str
    answer: str
    pieces: list[str]
    chosen: Tensor
    went_on: frozenset[int] = frozenset()
    foresight: Foresight = field(default_factory=Foresight)

    def passages(self, block: int) -> list[tuple[int, int, float]]:
        """The passages of a block that were passed on most: (first position, last + 1, share of layers and KV heads).

        A token counts if more than half as many layers and heads chose it as chose the block's most chosen token.
        """
        span = self.plan.block(block)
        share = self.chosen[:, :, span.start : span.stop].float().mean((0, 1))
        if not share.any():
            return []
        marked = torch.nonzero(share > share.max() / 2).flatten().tolist()
        found = [(start, stop, float(share[start:stop].max())) for start, stop in runs(marked, GAP)]
        best = sorted(found, key=lambda passage: -passage[2])[:_LISTED]
        return sorted((span.start + start, span.start + stop, strength) for start, stop, strength in best)

    def to_html(self) -> str:
        """A self-contained HTML page: the text with highlights, summed or of one layer or KV head."""
        layers, heads, _ = self.chosen.shape
        choices = ["<option value='all'>all layers and KV heads</option>"]
        for layer in range(layers):
            choices.append(f"<option value='{layer}'>layer {layer}</option>")
            choices += [
                f"<option value='{layer},{head}'>layer {layer}, KV head {head}</option>" for head in range(heads)
            ]
        masks = _masks(self.chosen)
        plan = self.plan
        budget = plan.competing
        seen = "" if budget is None else f" These see the best {budget:,} of all that blocks before them passed on."
        parts = [
            _HEAD,
            f"<h1>What {plan.blocks} blocks passed on</h1>",
            f"<p><b>Question:</b> {escape(self.query)}<br><b>Answer:</b> {escape(self.answer)}</p>",
            f"<p>{plan.document:,} tokens of document, anchor of {plan.anchor_length:,}. In every layer each KV head "
            f"of a block passes {plan.passing_length:,} of its tokens on to all later blocks, chosen by the compressor "
            f"<b>{escape(self.compressor)}</b>.{seen} The last block has nobody to pass to. The stronger the colour, "
            "the more layers and KV heads chose a token; <u>underlined</u> is what stands in the anchor, which all "
            "blocks see.</p>",
            self._propagated(),
            f"<p><label>Show <select id='view' data-layers='{layers}' data-heads='{heads}'>{''.join(choices)}"
            "</select></label></p>",
        ]
        for index in range(plan.blocks):
            block = plan.block(index)
            parts.append(
                f"<h2>Block {index + 1}: tokens {block.start:,} to {block.stop - 1:,}, passes {plan.passed(index):,} "
                "per KV head</h2>"
            )
            listed = [
                f"<li>{escape(''.join(self.pieces[start:stop]).strip() or '(white space)')} "
                f"<small>token {start:,}, up to {strength:.0%} of layers and heads</small></li>"
                for start, stop, strength in self.passages(index)
            ]
            if listed:
                parts.append(f"<p>Passed on most:</p><ul>{''.join(listed)}</ul>")
            parts.append(f"<pre>{self._text(block.start, block.stop, masks)}</pre>")
        return "\n".join([*parts, _SCRIPT])

    def _propagated(self) -> str:
        told = self.plan.propagated()
        if told is None:
            return ""
        return (
            f"<p>Up to layer {told['layer']} all tokens are read; above it the prefix and {told['rows']:,} tokens of "
            "the document, those that the question looks at, in <b>bold</b> type.</p>"
        )

    def _text(self, start: int, stop: int, masks: list[str]) -> str:
        """Tokens of a block as spans; neighbours that the same layers and heads chose share one."""
        anchored, every = self.plan.anchored, self.chosen.shape[0] * self.chosen.shape[1]
        spans = []
        marks = groupby(range(start, stop), key=lambda t: (masks[t], t < anchored, t in self.went_on))
        for (mask, held, on), run in marks:
            text = escape("".join(self.pieces[token] for token in run))
            if mask:
                strength = bin(int(mask, 16)).count("1") / every
                text = f"<span data-m='{mask}' style='--s:{strength:.2f}'>{text}</span>"
            text = f"<b>{text}</b>" if on else text
            spans.append(f"<u>{text}</u>" if held else text)
        return "".join(spans)


def runs(places: Sequence[int], gap: int = 1) -> list[tuple[int, int]]:
    """Ascending numbers as runs (first, last + 1), in which the next one is at most ``gap`` further on."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and place - found[-1][1] < gap:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


def explain(
    engine: Engine,
    prompt: Prompt,
    query: str,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> Explanation:
    """Read a prompt on one rank, answer it, and report which tokens each block passed on.

    Raises:
        InputError: the engine's strategy passes nothing on, the plan has one block or passes nothing, or there are
            several ranks.
    """
    check_passes(engine.reading.methods)
    if engine.group.size > 1:
        raise InputError(f"Explaining works on one rank, and there are {engine.group.size}; start one process.")
    prompt = engine.reading.arranged(prompt)
    plan = engine.plan(prompt, max_new_tokens)
    check_plan(plan)
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise InputError("Explaining needs a tokenizer; give one to Engine.from_model.")
    picked: dict[int, list[Tensor]] = {}

    def keep(layer: int, block: int, positions: Tensor) -> None:
        picked.setdefault(layer, []).append(positions.cpu())

    foresight = Foresight()
    look = None if plan.propagation or why_all_rows(engine.model.config) else foresight.look
    session = engine.prefill(prompt, max_new_tokens=max_new_tokens, progress=progress, on_selection=keep, look=look)
    went_on = frozenset(session.positions(max(session.cache.indices))) if plan.propagation else frozenset()
    words = decode(session, Sampling(max_new_tokens), engine.model, engine.group, tokenizer=tokenizer)
    answer = [token for token, _ in words]
    chosen = torch.zeros(len(picked), len(picked[0][0]), plan.query_start, dtype=torch.bool)
    for layer, positions in picked.items():
        chosen[layer].scatter_(1, torch.cat(positions, 1), True)
    pieces = _pieces(tokenizer, prompt.prefix + prompt.document)
    text = str(tokenizer.decode(answer, skip_special_tokens=True))
    return Explanation(plan, engine.reading.compressor.name, query, text.strip(), pieces, chosen, went_on, foresight)


def check_passes(methods: Sequence[Method]) -> None:
    """InputError if none of the strategies passes anything on."""
    if not any(method.passes for method in methods):
        passing = " or ".join(name for name, method in METHODS.items() if method.passes)
        raise InputError(f"The strategy {methods[0].name!r} passes nothing on that could be explained; use {passing}.")


def check_plan(plan: Plan) -> None:
    """InputError if a plan leaves nothing to pass on."""
    if plan.blocks == 1:
        raise InputError(
            f"A document of {plan.document} tokens is read as one block, which passes nothing on; "
            "ask for at least 2 blocks."
        )
    if not any(plan.passed(index) for index in range(plan.blocks)):
        raise InputError("No block passes anything on with this passing length and anchor; ask for other lengths.")


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.add(token, number == len(ids)) for number, token in enumerate(ids, 1)]


def _masks(chosen: Tensor) -> list[str]:
    """For each token a bit mask of the layers and KV heads that chose it, in hexadecimal; "" if none did."""
    flat = chosen.flatten(0, 1).T
    digits = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 4)).unflatten(1, (-1, 4)).int()
    values = (digits * torch.tensor([1, 2, 4, 8], dtype=torch.int32)).sum(-1).tolist()
    return ["".join("0123456789abcdef"[value] for value in row) if any(row) else "" for row in values]


_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>What the blocks passed on</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 2em 0 .3em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace;
  border-left: 3px solid #ddd; padding-left: 1em; }
span { background: rgba(255, 150, 0, calc(var(--s) * .9)); }
u { text-decoration-color: #aaa; } small { color: #666; }
</style>
</head>
<body>"""

_SCRIPT = """<script>
const view = document.getElementById("view");
const heads = +view.dataset.heads, layers = +view.dataset.layers;
function has(mask, bit) { return parseInt(mask[bit >> 2], 16) >> (bit & 3) & 1; }
view.onchange = () => {
  let bits = [];
  if (view.value === "all") bits = [...Array(layers * heads).keys()];
  else {
    const [layer, head] = view.value.split(",").map(Number);
    bits = head === undefined ? [...Array(heads).keys()].map(h => layer * heads + h) : [layer * heads + head];
  }
  for (const span of document.querySelectorAll("span[data-m]"))
    span.style.setProperty("--s", bits.reduce((sum, bit) => sum + has(span.dataset.m, bit), 0) / bits.length);
};
</script>
</body>
</html>
"""
