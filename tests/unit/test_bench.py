"""Benchmarks report what they ran: baseline, ratio, floor; and shapes with random weights are the known models'."""

from __future__ import annotations

import pytest
import torch

from apb import InputError
from apb.benchmarks.ceilings import measure_ceilings
from apb.benchmarks.prefill import bench_prefill
from apb.distributed.collectives import Group
from apb.hf.loading import model_shape
from apb.hf.random_weights import random_model, shape_config
from models import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "parameters"), [("llama-3.1-8b", 8_030_261_248), ("qwen2.5-14b", 14_770_033_664)])
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    """The configurations in the package are those models', weight for weight."""
    assert model_shape(shape_config(name)).parameters == parameters


def test_random_weights_depend_on_the_seed_alone():
    """Every rank makes the same model, torch's global generator is left alone, and logits are finite."""
    config = shape_config("llama-3.1-8b", layers=1)
    for name, value in {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 97}.items():
        setattr(config, name, value)
    state = torch.random.get_rng_state()
    first, again, other = (random_model(config, torch.float32, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        logits = [model(ids).logits for model in (first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert logits[0].isfinite().all()


def test_unknown_shape_is_refused():
    """The sentence lists the shapes there are."""
    with pytest.raises(InputError, match=r"Unknown model shape 'gpt-9'.*llama-3\.1-8b"):
        shape_config("gpt-9")


def test_rows_hold_baseline_ratio_and_floor():
    """The first strategy is the baseline of each length; ratios and shares follow from the seconds of the same run."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    ceilings = measure_ceilings(CPU, torch.float32, Group())
    assert ceilings.linear > 0
    assert ceilings.attention > 0
    assert ceilings.link == 0
    shape = model_shape(model.config)
    rows = list(bench_prefill(model, shape, ceilings, ["full", "apb"], [100, 300], 3, blocks=3))
    assert [(row.length, row.strategy) for row in rows] == [(100, "full"), (100, "apb"), (300, "full"), (300, "apb")]
    for full, apb in (rows[:2], rows[2:]):
        assert full.speedup is None
        assert apb.speedup == pytest.approx(full.seconds / apb.seconds)
        for row in (full, apb):
            assert len(row.all_seconds) == 3
            assert min(row.all_seconds) <= row.seconds <= max(row.all_seconds)
            assert row.of_floor == pytest.approx(row.floor_seconds / row.seconds)
            assert row.tokens_per_s == pytest.approx(row.length / row.seconds)
            assert all(seconds >= 0 for seconds in row.parts.values())
            assert min(row.parts[name] for name in ("qkv", "attention", "output", "mlp")) > 0
            assert row.parts["communication"] < row.parts["attention"]
        assert full.parts["scoring"] == full.parts["selection"] == 0 < min(apb.parts["scoring"], apb.parts["selection"])
    assert model.config._attn_implementation == "eager"  # given back


def test_a_prompt_without_document_is_refused():
    """The length counts the query too."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    ceilings = measure_ceilings(CPU, torch.float32, Group())
    with pytest.raises(InputError, match="leaves no document"):
        list(bench_prefill(model, model_shape(model.config), ceilings, ["full"], [33], 1))
