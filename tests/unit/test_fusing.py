"""Compiling the parts of layers: where it is done, what it may change, and that all of it can be undone."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama

from apb import Engine, InputError, Prompt
from apb.hf import fusing
from models import tiny_model


def test_nothing_is_compiled_on_the_cpu():
    """There it does not pay: not done by itself, and refused with the reason when asked for."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    engine = Engine.from_model(model)
    assert not any("NORM" in name.upper() and "forward" in vars(m) for name, m in model.named_modules())
    engine.close()
    with pytest.raises(InputError, match=r"fused=True cannot be had here: .*cpu"):
        Engine.from_model(model, fused=True)


def test_parts_run_compiled_and_come_back(monkeypatch):
    """Norms, MLPs and the rotary embedding go through torch.compile, to the same effect; undone, nothing is left."""
    compiled = []

    def compile_(function, **options):
        assert options == {"dynamic": True}

        def run(*args, **kwargs):
            compiled.append(function.__qualname__)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(fusing, "why_not", lambda device: None)
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    prompt = Prompt.from_tokens([1, 2], [(7 * i) % 97 for i in range(200)], [5, 6, 7])
    slow = Engine.from_model(model, strategy="apb", blocks=3, fused=False)
    expected = slow.prefill(prompt).logits
    with pytest.raises(InputError, match="Another engine on this model"):
        Engine.from_model(model)
    slow.close()
    assert not compiled
    rotate = modeling_llama.apply_rotary_pos_emb
    fast = Engine.from_model(model, strategy="apb", blocks=3)
    assert torch.equal(fast.prefill(prompt).logits, expected)
    layers = model.config.num_hidden_layers
    assert compiled.count("LlamaRMSNorm.forward") == 2 * layers + 1
    assert compiled.count("LlamaMLP.forward") == layers
    assert compiled.count("apply_rotary_pos_emb") == layers
    fast.close()
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert not any("forward" in vars(module) for module in model.modules())
