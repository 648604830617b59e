"""Propagation on one rank: against the dense oracle, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import apb
import propagated
from apb import Propagation
from apb.evaluation.settings import Setting, settings
from apb.hf.counting import model_shape
from apb.hf.rows import decoder_layers, other_rows
from apb.kernels.attention import attention
from apb.kernels.scattered import scattered_window
from apb.kernels.segment import Segment
from apb.kernels.selection import attention_received
from apb.planning.cost import DEALING_SECONDS, Ceilings, predict
from apb.strategies.propagation import best_rows
from families import ANSWER, PROMPT
from propagated import KEEP, LAYER

FULL: list[int | None] = [None] * 6


@pytest.mark.parametrize(("name", "reading"), propagated.CASES)
def test_against_the_oracle(name: str, reading: str) -> None:
    """The rows that go on, logits, and decode over a cache of uneven layers are those of one dense masked softmax."""
    logits, positions = propagated.expected(name, reading)
    outcome = propagated.read(name, reading)
    assert outcome.positions == positions
    assert outcome.lengths == (len(PROMPT), len(positions))
    assert outcome.keys is not None and outcome.keys.shape[1] == len(positions)
    torch.testing.assert_close(outcome.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "reach"), [(2000, 63), (1016, 63), (1000, 62), (40, 2), (16, 1), (7, 0), (1, 0)])
def test_the_text_around_a_place_goes_on_with_it(count: int, reach: int) -> None:
    """As far as a code is long, or where few tokens go on, so that there are eight places."""
    scores = torch.linspace(0.2, 0.1, 10_000)
    scores[[300, 9_990]] = torch.tensor([1.0, 2.0])
    around = [*range(300 - reach, 301 + reach), *range(9_990 - reach, min(9_991 + reach, 10_000))]
    rest = [place for place in range(10_000) if place not in around][: max(count - len(around), 0)]
    assert best_rows(scores, count).tolist() == sorted([*around[-count:], *rest])


@pytest.mark.parametrize("reading", propagated.READINGS)
def test_keeping_all_changes_nothing(reading: str) -> None:
    """With keep=1.0 every strategy gives what it gives without propagation."""
    kept = propagated.read("qwen3", reading, propagation=apb.Propagation(propagated.LAYER, 1.0))
    without = propagated.read("qwen3", reading, propagation=None)
    torch.testing.assert_close(kept.logits, without.logits, rtol=1e-4, atol=1e-4)
    assert kept.positions == without.positions == list(range(len(PROMPT)))


def test_documents_answer_the_question_that_they_were_read_for(tmp_path: Path) -> None:
    """As the prompt does, any number of times, from disk too; other questions are refused."""
    engine = propagated.engine("qwen3", "apb")
    parts: dict[str, Any] = {"tokens": PROMPT.document, "prefix": PROMPT.prefix}
    document = engine.read(**parts, question=PROMPT.query)
    wanted = engine.generate(PROMPT, max_new_tokens=9)
    for _ in range(2):
        answer = document.ask(PROMPT.query, max_new_tokens=9)
        assert (answer.token_ids, answer.read_for, answer.exact) == (wanted.token_ids, "this question", False)
        assert answer.propagation == {"layer": LAYER, "rows": 30, "share": 30 / 101}
    with pytest.raises(apb.InputError, match="read it anew for this one, or without propagation"):
        document.ask(ANSWER, max_new_tokens=1)
    with pytest.raises(apb.InputError, match="give the question"):
        engine.read(**parts)
    with pytest.raises(apb.InputError, match="cannot go on from one"):
        engine.read(**parts, question=PROMPT.query, after=document)
    document.save(tmp_path)
    loaded = propagated.engine("qwen3", "apb", propagation=None).load(tmp_path)
    assert loaded.plan == document.plan
    assert loaded.state.cache.held == document.state.cache.held
    assert torch.equal(loaded.prefill(PROMPT.query).logits, document.prefill(PROMPT.query).logits)
    with pytest.raises(apb.InputError, match="read it anew for this one, or without propagation"):
        loaded.ask(ANSWER, max_new_tokens=1)
    with pytest.raises(apb.InputError, match="cannot go on from one"):
        propagated.engine("qwen3", "apb", propagation=None).read(**parts, after=loaded)


def test_results_tell_it() -> None:
    """Not exact unless all rows go on; nothing is told where nothing was asked for."""
    for keep, exact in ((1.0, True), (KEEP, False)):
        result = propagated.engine("qwen3", "full", propagation=Propagation(None, keep)).generate(PROMPT)
        assert result.exact is exact
        assert result.to_dict()["propagation"]["layer"] == 2
    assert "propagation" not in propagated.engine("qwen3", "full", propagation=None).generate(PROMPT).to_dict()


def test_what_needs_all_rows_is_refused() -> None:
    engine = propagated.engine("qwen3", "full")
    with pytest.raises(apb.InputError, match="takes the same for all"):
        engine.prefill(PROMPT).to_dynamic_cache()
    with pytest.raises(apb.InputError, match="make the engine without propagation"):
        engine.inspect(PROMPT, [0], lambda strategy, layer: None)


def test_storage_is_made_for_what_is_kept() -> None:
    """Rooms of upper layers are as small as what they hold, in rounds as well; answers have theirs."""
    for reading in ("full", "apb, 3 rounds"):
        session = propagated.engine("qwen3", reading).prefill(PROMPT, max_new_tokens=7)
        rooms = [layer.keys.shape[2] for layer in session.cache.layers]
        kept = len(PROMPT) - len(PROMPT.document) + propagated.COUNT
        assert rooms == [len(PROMPT) + 7] * (LAYER + 1) + [kept + 7] * (propagated.LAYERS - LAYER - 1)


@pytest.mark.parametrize(
    ("text", "meant"),
    [("off", None), ("auto", Propagation()), ("0.3", Propagation(None, 0.3)), ("25%@7", Propagation(7, 0.25))],
)
def test_what_the_option_means(text: str, meant: Propagation | None) -> None:
    assert Propagation.parsed(text) == meant
    assert meant is None or Propagation.parsed(str(meant)) == meant


@pytest.mark.parametrize("text", ["0", "1.1", "-0.2", "much", "0.2@", "0.2@x", "0.2@-1", "nan"])
def test_options_that_mean_nothing(text: str) -> None:
    with pytest.raises(apb.InputError):
        Propagation.parsed(text)


def test_what_is_no_propagation() -> None:
    with pytest.raises(apb.InputError, match=r"not 0\.2"):
        propagated.engine("qwen3", "full", propagation=0.2)


def test_the_layer_is_one_that_sees_the_whole_text() -> None:
    """By default the first such layer from the middle on; windows as long as the prompt do not count."""
    assert Propagation().settled(FULL, 100).layer == 3
    assert Propagation().settled([None, None], 100).layer == 0
    sliding = [24, 24, None, 24, 24, None, 24, 24]
    assert Propagation().settled(sliding, 100).layer == 5
    assert Propagation().settled(sliding, 24).layer == 4
    assert Propagation().settled([24, None, 24, 24, 24, None], 100).layer == 1
    assert Propagation(2).settled(sliding, 100) == Propagation(2)
    for asked, reach, said in (
        (Propagation(4), sliding, "sliding window of 24 tokens.*such as 5"),
        (Propagation(5), FULL, "layers 0 to 5.*up to 4"),
        (Propagation(), [24, 24, None], "leave propagation off"),
        (Propagation(), [None], "leave propagation off"),
    ):
        with pytest.raises(apb.InputError, match=said):
            asked.settled(reach, 100)


def test_at_least_one_row_goes_on() -> None:
    assert [Propagation(keep=keep).rows(30) for keep in (1e-9, 0.1, 0.5, 1.0)] == [1, 3, 15, 30]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_attention_that_keys_receive(softcap: float | None) -> None:
    """A share of a softmax over more keys than those that are asked about: all shares of a head sum to 1."""
    torch.manual_seed(3)
    q, k = torch.randn(70, 4, 8), torch.randn(50, 2, 8)
    _, lse = attention(q, [Segment(k, k)], 0.5, softcap=softcap)
    received = attention_received(q, k, 0.5, softcap, lse).sum(0) * 2  # two heads to a KV head
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(received, logits.softmax(-1).mean(1).sum(0), rtol=1e-4, atol=1e-5)
    part = attention_received(q, k[10:], 0.5, softcap, lse).sum(0) * 2
    torch.testing.assert_close(part, received[10:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_windows_over_positions_with_gaps(softcap: float | None) -> None:
    """More rows than a chunk has, each of which sees the keys in its window and no others."""
    torch.manual_seed(5)
    places = sorted(torch.randperm(900)[:300].tolist())
    rows = places[:40] + places[90:]
    q, k, v = torch.randn(len(rows), 4, 8), torch.randn(300, 2, 8), torch.randn(300, 2, 8)
    out, lse = scattered_window(q, rows, k, v, places, 25, 0.5, softcap)
    for row, place in enumerate(rows):
        seen = [index for index, key in enumerate(places) if place - 25 < key <= place]
        wanted, total = attention(q[row : row + 1], [Segment(k[seen], v[seen])], 0.5, softcap=softcap)
        torch.testing.assert_close(out[row : row + 1], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[:, row : row + 1], total, rtol=1e-4, atol=1e-5)


def test_models_whose_rows_cannot_be_selected() -> None:
    """A layer that is given rows in a way that is not known is refused, and no hook is left behind."""
    engine = propagated.engine("qwen3", "full")
    model, modules = engine.model, engine._attachment.modules
    layers = decoder_layers(model, modules)
    assert layers == list(model.model.layers)
    for hidden, options in ((torch.zeros(2, 1, 5, 64), {}), (torch.zeros(1, 5, 64), {"bias": torch.zeros(5)})):
        with (
            pytest.raises(apb.InputError, match="cannot select the rows of Qwen3ForCausalLM"),
            other_rows(model, modules, 1, lambda x: x[:, :2]),
        ):
            layers[1](hidden, **options)
    assert not any(layer._forward_pre_hooks for layer in layers)
    with pytest.raises(apb.InputError, match="not a list of modules"):
        decoder_layers(nn.ModuleDict({"one": modules[0]}), modules[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize("reading", ["full", "apb", "apb, 3 rounds", "star"])
def test_costs(reading: str) -> None:
    """Cache bytes are those of the session; work is that of two models, one of all rows and one of those that go on."""
    engine = propagated.engine("qwen3", reading)
    plan = engine.plan(PROMPT)
    shape = model_shape(engine.model.config)
    cost, without = predict(plan, shape, 4), predict(replace(plan, propagation=None), shape, 4)
    assert sum(rank.cache_bytes for rank in cost.ranks) == engine.prefill(PROMPT).cache_bytes()
    assert cost.ranks[0].weight_bytes == without.ranks[0].weight_bytes
    rows = sum(len(span) for round in range(plan.rounds) for span in plan.spans(0, round))
    above = propagated.COUNT + len(PROMPT) - len(PROMPT.document)
    layer = shape.layer_parameters // propagated.LAYERS
    outside = 2 * shape.hidden * shape.vocabulary
    assert cost.ranks[0].linear_flops == 2 * layer * (2 * rows + 3 * above) + outside
    assert cost.flops < without.flops
    rates = Ceilings(1e12, 1e12, math.inf)
    assert cost.seconds(rates) == pytest.approx(DEALING_SECONDS + max(rank.seconds(rates) for rank in cost.ranks))
    assert cost.floor(rates) < DEALING_SECONDS


def test_readings_differ_by_it() -> None:
    """Records of evaluations tell it, and all values are combined with all strategies."""
    found = settings(["full", "apb"], propagations=(None, Propagation(3, 0.4)))
    assert [(setting.strategy, setting.asked.get("propagate")) for setting in found] == [
        ("full", None),
        ("full", "0.4@3"),
        ("apb", None),
        ("apb", "0.4@3"),
    ]
    engine = propagated.engine("qwen3", "full", propagation=None)
    other = replace(Setting.of("full"), propagation=Propagation(3, 0.4)).engine(engine)
    assert other.plan(PROMPT).going_on == 40
