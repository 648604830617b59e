"""Recurrent layers are exact: a state runs through the rows of a text, whatever its attention layers see of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import apb
from families import PROMPT

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
COUNTS = {"vocab_size": 503, "num_hidden_layers": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 8, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}  # fmt: skip


def model_of(family: str) -> Any:
    """A small random model, whose answers depend on its recurrent layers."""
    config = AutoConfig.for_model(family, **SMALL, **COUNTS, **FAMILIES[family])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_transformers(family: str) -> None:
    """Logits, those after each of several tokens read in one pass, and those of a document asked twice."""
    model = model_of(family)
    more = [7, 19, 4]
    with torch.no_grad():
        expected = model(torch.tensor([[*PROMPT.token_ids, *more]])).logits[0, len(PROMPT.token_ids) - 1 :]
    engine = apb.Engine.from_model(model, strategy="full", verify=False)
    session = engine.prefill(PROMPT)
    torch.testing.assert_close(session.logits, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(session.extend(more), expected[-1], rtol=1e-4, atol=1e-4)
    document = engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix)
    for _ in range(2):
        logits = document.prefill(PROMPT.query).logits
        torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
        document.prefill((5, 6))
    engine.close()


def test_star_with_an_anchor_without_rows() -> None:
    """On one rank block 0 holds star's anchor: with everything in sight of a block, the rest is as ever."""
    model = model_of("qwen3_5_text")
    for layer in model.model.layers:  # attention layers that add nothing: what is left is recurrent, and exact
        if hasattr(layer, "self_attn"):
            layer.self_attn.o_proj.weight.data.zero_()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT.token_ids])).logits[0, -1]
    for strategy in ("star", "apb"):
        engine = apb.Engine.from_model(model, strategy=strategy, blocks=3, verify=False)
        torch.testing.assert_close(engine.prefill(PROMPT).logits, expected, rtol=1e-4, atol=1e-4)
        engine.close()


def test_rounds_are_refused() -> None:
    """By name, before anything is read."""
    engine = apb.Engine.from_model(model_of("lfm2"), blocks=4, rounds=2, verify=False)
    with pytest.raises(apb.InputError, match=r"'lfm2' models have recurrent layers.*one round"):
        engine.prefill(PROMPT)
