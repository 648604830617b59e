"""Fidelity of decode methods: mass by transformers' own weights, KL by the logits of the methods themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import apb
from apb.decoding import Pages, Squeezed
from apb.evaluation.decode_fidelity import measure
from apb.evaluation.statistics import bootstrap
from command_line import Cli
from extension.nearest import Nearest
from models import tiny_model, without_eos

PROMPT = apb.Prompt.from_tokens([1, 2], [(37 * i * i + 11 * i) % 97 for i in range(301)], [5, 6, 7])


def test_mass_and_divergence_are_those_written_out() -> None:
    """Of a method whose keys are known, over the two tokens of the exact greedy answer; a budget of everything loses
    nothing."""
    model = without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16))
    tokens = list(PROMPT.token_ids)
    with torch.no_grad():
        for _ in range(2):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        full = model(torch.tensor([tokens]), output_attentions=True)
    engine = apb.Engine.from_model(model, strategy="full")
    near, pages, clusters = measure(engine, PROMPT, [Nearest(9), Pages(1.0), Squeezed(1.0)], tokens=2)
    other = apb.Engine.from_model(model, strategy="full", decoding=Nearest(9)).prefill(PROMPT)
    predicted = torch.stack([other.extend([token]) for token in tokens[-2:]]).log_softmax(-1)
    expected = full.logits[0, -2:].log_softmax(-1)
    assert near.kl == pytest.approx((expected.exp() * (expected - predicted)).sum(-1).mean().item(), abs=1e-4)
    least = 1.0
    for layer, weights in enumerate(full.attentions):
        heads = []
        for head in range(4):
            rows = ((weights[0, head, row], row) for row in range(len(tokens) - 2, len(tokens)))
            heads.append(sum((x[0] + x[row - 8 : row + 1].sum()).item() for x, row in rows) / 2)
        assert near.mass[layer] == pytest.approx(sum(heads) / 4, abs=1e-4)
        least = min(least, *heads)
    assert near.mass_min == pytest.approx(least, abs=1e-4)
    assert (near.tokens, near.decode) == (2, "nearest, last 9")
    for each in (pages, clusters):
        assert each.share == each.agreement == 1 and each.mass == pytest.approx([1.0] * 3, abs=1e-5)
        assert each.kl == pytest.approx(0, abs=1e-5)


def test_an_interval_of_a_mean() -> None:
    """400 draws of which half are 1: 0.5 plus or minus 1.96 * 0.5 / 20; of one value there is none."""
    assert bootstrap([0.0, 1.0] * 200) == pytest.approx((0.451, 0.549), abs=0.006)
    assert bootstrap([0.3]) == (0.3, 0.3)


def test_command(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """A row for every task, length and method, with intervals; more keys hold more mass."""
    given = ("eval", "decode", "--task", "single", "--length", 800, "--model", checkpoint, "--device", "cpu")
    how = ("--decode", "pages", "--decode", "squeezed", "--share", 0.15, "--share", 0.5, "--out", tmp_path / "a.json")
    found = cli(*given, *how, "--samples", 2, "--tokens", 3, "--json").json
    rows = {row["decode"]: row for row in found["results"]}
    assert list(rows) == [f"{name}, share {share}" for name in ("pages", "squeezed") for share in (0.15, 0.5)]
    for name in ("pages", "squeezed"):
        few, many = (rows[f"{name}, share {share}"] for share in (0.15, 0.5))
        assert few["share"] < many["share"] and few["mass_mean"] < many["mass_mean"] < 1
        assert few["mass_min"] <= min(few["mass"]) and len(few["mass"]) == 3
        assert few["intervals"]["kl"][0] <= few["kl"] <= few["intervals"]["kl"][1]
    assert json.loads((tmp_path / "a.json").read_text()) == found
    assert found["command"].startswith("apb eval decode --task single")
    short = ("--samples", 1, "--tokens", 1)
    assert "pages, share 0.5" in cli(*given, *short, "--decode", "pages", "--share", 0.5).out
    cli(*given, "--tokens", 0).refused("at least 1")
