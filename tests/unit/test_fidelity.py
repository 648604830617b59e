"""Fidelity: shares of attention against transformers' own weights under masks written out, KL against its logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import apb
from apb.compressors import Recent
from apb.distributed.collectives import Group
from apb.evaluation.fidelity import measure, sample_rows
from apb.evaluation.settings import Setting
from apb.layers.base import AttentionInput
from apb.strategies import make_strategy
from cases import CASES, Case, expected
from command_line import Cli
from families import PECULIAR, make

BUDGETS = ("budget", "budget, query-edge", "budget, anchor longer than a block", "budget of everything")


@pytest.mark.parametrize("name", ["four heads share keys", "recent", "star, short anchor", "no prefix", *BUDGETS])
def test_mass_and_divergence_are_those_written_out(name: str) -> None:
    """Per layer and KV head: transformers' own attention weights, summed over what the oracle lets a row see."""
    case: Case = CASES[name]
    prompt = case.prompt
    model = case.model()
    result, _ = expected(name)
    with torch.no_grad():
        full = model(torch.tensor([prompt.token_ids]), output_attentions=True)
    compressor = case.compressor if case.strategy == "apb" else None
    setting = Setting.of(
        case.strategy,
        compressor,
        blocks=case.blocks,
        anchor_length=case.anchor_length,
        passing_length=case.passing_length,
        passing_budget=case.passing_budget,
    )
    engine = apb.Engine.from_model(model, strategy="full")
    (found,) = measure(engine, prompt, [setting], rows=10_000)
    plan = setting.engine(engine).plan(prompt)
    engine.close()
    first, count = len(prompt.prefix), len(prompt.document)
    assert found.rows == count
    for layer, weights in enumerate(full.attentions):
        heads = weights.shape[1] // case.kv_heads
        for head in range(case.kv_heads):
            total = 0.0
            for row in range(first, first + count):
                block = next(b for b in map(plan.block, range(plan.blocks)) if b.start <= row < b.stop)
                seen = set(range(block.start, row + 1)) | (set(range(plan.anchored)) if block.index else set())
                for other in range(block.index) if case.passing_budget is None else ():
                    seen |= set(result.selected[layer][other][head].tolist())
                if case.passing_budget is not None:
                    seen |= set(result.seen[layer][block.index][head])
                keys = sorted(key for key in seen if key <= row)
                total += weights[0, head * heads : (head + 1) * heads, row][:, keys].sum().item()
            assert found.mass[layer][head] == pytest.approx(total / (heads * count), abs=1e-5)
    expected_answer = full.logits[0, -1].log_softmax(-1)
    divergence = (expected_answer.exp() * (expected_answer - result.logits.log_softmax(-1))).sum().item()
    assert found.kl_answer == pytest.approx(divergence, abs=1e-4)
    assert found.kl_document > 0


def test_what_sees_everything_loses_nothing() -> None:
    """Full attention beside itself, and minference with room for all columns: mass 1, no divergence."""
    case = CASES["full"]
    engine = apb.Engine.from_model(case.model(), strategy="full")
    full, sparse = measure(engine, case.prompt, [Setting.of("full"), Setting.of("minference")], rows=20)
    engine.close()
    for found in (full, sparse):
        assert torch.tensor(found.mass) == pytest.approx(torch.ones(3, case.kv_heads).numpy(), abs=1e-5)
        assert (found.kl_document, found.kl_answer) == pytest.approx((0, 0), abs=1e-5)
        assert found.agreement == 1.0


def test_columns_and_diagonals_that_rows_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row sees a key before it where its head has the key's column or the diagonal of their distance."""
    columns, diagonals = torch.zeros(2, 2, 6, dtype=torch.bool).unbind()
    columns[0, 1] = columns[1, 0] = diagonals[:, 0] = diagonals[0, 2] = True
    plan = apb.Plan.build(prefix=0, document=5, query=1, strategy="minference", vertical_size=2, slash_size=2)
    strategy = make_strategy(plan, Group(), Recent())
    monkeypatch.setattr(strategy, "choose", lambda layer: (columns, diagonals))
    visible = strategy.visible(AttentionInput(7, *torch.zeros(3, 6, 2, 4), 1.0))
    seen = visible(0, slice(0, 2), torch.tensor([0, 4]), 6)
    assert seen.int().tolist() == [
        [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0]],
        [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]],
    ]


def test_layers_that_are_not_plain_are_refused() -> None:
    """A sliding window hides what full attention would weigh: the sentence names a layer and a way out; the model is
    given back as it was."""
    model = make(*PECULIAR["mistral"])
    before = model.config._attn_implementation
    engine = apb.Engine.from_model(model, strategy="full")
    with pytest.raises(apb.InputError, match=r"Layer 0 has a sliding window.*apb eval"):
        measure(engine, CASES["full"].prompt, [Setting.of("apb", blocks=3)], rows=5)
    engine.close()
    assert model.config._attn_implementation == before != "apb"


def test_rows_are_of_the_document_and_repeatable() -> None:
    """Sampled rows are distinct rows of the document, the same for the same seed."""
    prompt = apb.Prompt.from_tokens([1, 2], range(3, 53), [60])
    rows = sample_rows(prompt, 20, 1)
    assert rows == sorted(set(rows)) == sample_rows(prompt, 20, 1) != sample_rows(prompt, 20, 2)
    assert set(rows) <= set(range(2, 52))
    assert sample_rows(prompt, 99, 1) == list(range(2, 52))


def test_command(cli: Cli, checkpoint: Path) -> None:
    """One row for every task, length and reading; more is seen with more passed."""
    given = ["--task", "single", "--length", 800, "--samples", 2, "--rows", 16, "--blocks", 4, "--strategy", "apb"]
    place = ["--model", checkpoint, "--device", "cpu", "--json"]
    few, many = (
        cli("eval", "fidelity", *given, "--passing-length", passing, *place).json["results"][0] for passing in (0, 60)
    )
    assert (few["compressor"], many["compressor"]) == (None, "query-edge")
    assert few["mass_min"] <= few["mass_mean"] < many["mass_mean"] < 1
    assert (many["samples"], many["rows"], len(many["mass"]), len(many["mass"][0])) == (2, 32, 3, 2)
    assert json.loads(json.dumps(many)) == many
    cli("eval", "fidelity", *given, "--rows", 0, *place).refused("Rows", "at least 1")
