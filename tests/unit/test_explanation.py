"""What `apb explain` shows: exactly what the blocks passed on, and text that is the document's."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import apb
import oracle
from apb.cli.main import app, run
from apb.explanation import Explanation, explain
from apb.foresight import Foresight
from byte_checkpoint import byte_tokenizer
from hybrids import make
from models import tiny_model

TEXT = "Größe <b>&amp; 'Maß'</b>\nwas lit by the keeper of Orrin, called Maud. " * 2


def engine_and_prompt(**options: object) -> tuple[apb.Engine, apb.Prompt]:
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    options = {"blocks": 4, "anchor_length": 20, "passing_length": 5} | options
    engine = apb.Engine.from_model(model, byte_tokenizer(), **options)
    return engine, apb.Prompt.from_text(engine.tokenizer, TEXT, "Who?")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    engine, prompt = engine_and_prompt()
    found = explain(engine, prompt, "Who?", max_new_tokens=3)
    engine.close()
    return found


def test_what_the_blocks_passed_on(explanation: Explanation) -> None:
    """Layer by layer and KV head by KV head it is the oracle's selection, at true positions."""
    engine, prompt = engine_and_prompt()
    parts = (prompt.prefix, prompt.document, prompt.query)
    sizes = {"blocks": 4, "anchor_length": 20, "passing_length": 5}
    expected = oracle.dense_prefill(engine.model, *parts, **sizes)
    assert expected.margins > 1e-5
    for layer, selected in enumerate(expected.selected):
        for head in range(2):
            positions = torch.cat([block[head] for block in selected[:-1]])  # the last block's go nowhere
            assert torch.nonzero(explanation.chosen[layer, head]).flatten().tolist() == positions.tolist()
    assert explanation.answer == engine.generate(prompt, max_new_tokens=3).text.strip()
    engine.close()


def test_what_went_on() -> None:
    """With propagation the page has in bold type what went through the upper layers, and the text is the document's."""
    engine, prompt = engine_and_prompt(propagation=apb.Propagation(0, 0.3))
    found = explain(engine, prompt, "Who?", max_new_tokens=3)
    session = engine.prefill(prompt)
    positions = [place for place in session.positions(2) if place < session.plan.query_start]
    assert sorted(found.went_on & set(range(session.plan.query_start))) == positions
    page = found.to_html().partition("<h2>")[2]
    bold = "".join(re.findall("<b>(.*?)</b>", page, re.DOTALL))
    assert unescape(re.sub("<[^>]*>", "", bold)) == "".join(found.pieces[place] for place in positions)
    engine.close()


def test_what_propagation_would_keep() -> None:
    """Transformers' own weights of the question's rows, in the layers above, on the tokens that a layer scores best."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258, layers=4)
    prompt = apb.Prompt((5, 6), tuple(range(20, 140)), (7, 8, 9))
    model.set_attn_implementation("eager")
    weights = model(torch.tensor([prompt.token_ids]), output_attentions=True).attentions
    paid = [each[0, :, 122:, 2:122].detach().mean(1).sum(0) for each in weights]

    def seen(**options: Any) -> Foresight:
        engine, foresight = apb.Engine.from_model(model, **options), Foresight()
        engine.prefill(prompt, look=foresight.look)
        engine.close()
        return foresight

    foresight = seen(strategy="full")
    assert all(foresight.received[layer].sub(each).abs().max() < 1e-5 for layer, each in enumerate(paid))
    pooled = [max(paid[1][max(place - 1, 0) : place + 2]) for place in range(120)]  # three tokens of 24
    best = sorted(range(120), key=lambda place: -pooled[place])[:24]
    expected = sum(float(each[best].sum() / each.sum()) for each in paid[2:]) / 2
    assert foresight.held(apb.Propagation(1, 0.2)) == pytest.approx(expected, rel=1e-4)
    assert foresight.held(apb.Propagation(1, 1.0)) == pytest.approx(1.0)
    (layer, held), (other, _) = foresight.table()
    assert (layer, other) == (1, 2) and held[2] == pytest.approx(expected, rel=1e-4)
    whole, parts = (seen(strategy="star", blocks=3, rounds=rounds).received for rounds in (1, 3))
    assert all(parts[layer].sub(each).abs().max() < 1e-5 for layer, each in whole.items())
    assert whole[3].sub(paid[3]).abs().max() > 0.01


def test_nothing_is_foretold_of_models_that_are_read_without_propagation() -> None:
    """Every layer of Falcon-H1 attends to all, but its states run through every row."""
    options: dict[str, Any] = {"blocks": 4, "anchor_length": 20, "passing_length": 5, "verify": False}
    engine = apb.Engine.from_model(make("falcon_h1"), byte_tokenizer(), **options)
    prompt = apb.Prompt.from_text(engine.tokenizer, TEXT, "Who?")  # type: ignore[arg-type]
    assert not explain(engine, prompt, "Who?", max_new_tokens=1).foresight.received
    engine.close()


def test_passages(explanation: Explanation) -> None:
    """Inside their block, in order, with the share of layers and KV heads that chose their strongest token."""
    for block in range(3):
        passages = explanation.passages(block)
        span = explanation.plan.block(block)
        assert 1 <= len(passages) <= 3
        assert passages == sorted(passages)
        for start, stop, strength in passages:
            assert span.start <= start < stop <= span.stop
            assert strength == pytest.approx(float(explanation.chosen[:, :, start:stop].float().mean((0, 1)).max()))
    assert explanation.passages(3) == []


def test_passages_by_hand() -> None:
    """Tokens count that more than half as many chose as chose the strongest; gaps of three tokens do not part them."""
    plan = apb.Plan.build(0, 60, 2, blocks=2, anchor_length=2, passing_length=9)
    chosen = torch.zeros(1, 4, 60, dtype=torch.bool)
    chosen[:, :, [3, 7, 12]] = True  # three tokens lie between the first two, four between the others
    chosen[:, :2, 20] = True  # half as many: not marked
    chosen[:, :3, 21] = True
    explanation = Explanation(plan, "query", "Who?", "x", ["a"] * 60, chosen)
    assert explanation.passages(0) == [(3, 8, 1.0), (12, 13, 1.0), (21, 22, 0.75)]


class Page(HTMLParser):
    """Collects what a page loads, its text blocks, and its highlighted spans."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.inside: list[str] = []
        self.texts: list[str] = []
        self.marked: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [str(given[name]) for name in ("src", "href") if name in given]
        if tag == "pre":
            self.texts.append("")
        if tag in ("pre", "span"):
            self.inside.append(given.get("data-m") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("pre", "span"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data
            if self.inside[-1]:
                self.marked.append((self.inside[-1], data))


def test_page(explanation: Explanation) -> None:
    """It loads nothing; its text is the document, escaped; each highlight names the layers and heads that chose it."""
    html = explanation.to_html()
    page = Page()
    page.feed(html)
    assert page.loads == []
    assert "http" not in html
    assert len(page.texts) == 4
    assert "".join(page.texts) == TEXT
    assert "<b>&amp;" not in "".join(re.findall(r"<pre>.*?</pre>", html, re.S))
    bits = [sum(bin(int(mask, 16)).count("1") * len(text.encode()) for mask, text in page.marked)]
    assert bits[0] >= int(explanation.chosen.sum()) - 20  # bytes of one character share the last one's piece
    assert unescape(explanation.to_html()).count("<option") == 1 + 3 + 3 * 2


def test_a_page_tells_of_a_budget() -> None:
    """Where not all that is passed on is seen the page says how much is, and only there."""
    engine, prompt = engine_and_prompt(passing_budget=9)
    html = explain(engine, prompt, "Who?", max_new_tokens=1).to_html()
    engine.close()
    assert "These see the best 9 of all" in html
    engine, prompt = engine_and_prompt(passing_budget=15)
    assert "These see" not in explain(engine, prompt, "Who?", max_new_tokens=1).to_html()
    engine.close()


def test_masks_name_layer_and_head() -> None:
    """Bit layer * kv_heads + head, four bits a digit, the lowest first."""
    engine, prompt = engine_and_prompt()
    plan = engine.plan(prompt)
    engine.close()
    chosen = torch.zeros(3, 2, plan.query_start, dtype=torch.bool)
    chosen[0, 1, 40] = chosen[2, 0, 40] = True  # bits 1 and 4
    html = Explanation(plan, "query", "Who?", "x", ["a"] * plan.query_start, chosen).to_html()
    assert re.findall(r"data-m='(\w+)' style='--s:([\d.]+)'>(a+)<", html) == [("21", "0.33", "a")]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"strategy": "star", "passing_length": None}, ["'star'", "use apb"]),
        ({"strategy": "full"}, ["'full'", "use apb"]),
        ({"blocks": 1}, ["one block", "at least 2"]),
        ({"passing_length": 0}, ["No block passes"]),
    ],
)
def test_refused(options: dict[str, object], fragments: list[str]) -> None:
    """Nothing is passed on, so nothing can be explained: a sentence that says what to ask for."""
    engine, prompt = engine_and_prompt(**options)
    with pytest.raises(apb.InputError) as refusal:
        explain(engine, prompt, "Who?")
    engine.close()
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value


def test_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """`apb explain` writes the page and says where; on standard output is what propagation would keep."""
    document, out = tmp_path / "document.txt", tmp_path / "page.html"
    document.write_text(TEXT)
    options = ["--document", document, "--query", "Who?", "--model", checkpoint, "--device", "cpu", "--blocks", 3]
    monkeypatch.setattr("sys.argv", ["apb", "explain", *map(str, options), "--out", str(out)])
    assert run(app) == 0
    printed = capfd.readouterr()
    assert "what --propagate SHARE@LAYER would keep" in " ".join(printed.out.split()) and "│ 1 " in printed.out
    assert f"apb: wrote {out}" in printed.err
    assert out.read_text().startswith("<!DOCTYPE html>")
    monkeypatch.setattr("sys.argv", ["apb", "explain", *map(str, options[:-2]), "--strategy", "ring"])
    assert run(app) == 2
    assert "'ring'" in capfd.readouterr().err
