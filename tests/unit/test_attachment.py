"""What an engine does to a model, and undoes: attention taken over and given back, RoPE that depends on the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import apb
from apb.hf.rope import pin_length
from cases import ANSWER, VOCABULARY, Case, read
from models import hooks, transformers_logits, transformers_says, without_eos

PROMPT = Case(1).prompt


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- taking a model over and giving it back ------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_close_gives_the_model_back(implementation: str) -> None:
    """After close the model has its own attention, no hooks and no attributes of ours: the same logits to the bit."""
    model = Case(1).model()
    model.set_attn_implementation(implementation)
    before, hooked = transformers_logits(model, PROMPT.token_ids), hooks(model)
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    engine = Case(3, compressor="retaining").engine(model)
    engine.generate(PROMPT, max_new_tokens=3)
    assert hooks(model) > hooked
    engine.close()
    assert model.config._attn_implementation == implementation
    assert hooks(model) == hooked
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert torch.equal(transformers_logits(model, PROMPT.token_ids), before)


def test_a_model_that_is_attached_says_so() -> None:
    """Called directly while an engine has it, a model must not compute something silently wrong."""
    model = Case(1).model()
    engine = apb.Engine.from_model(model)
    for _ in range(2):  # before and after the engine has used it
        with pytest.raises(RuntimeError, match=r"attached to an apb\.Engine.*close\(\)"):
            model(torch.tensor([[1, 2, 3]]))
        engine.prefill(PROMPT)


def test_a_closed_engine_says_so() -> None:
    """Neither the engine nor its sessions compute anything after close; closing twice is no harm."""
    model = Case(1).model()
    engine = apb.Engine.from_model(model, blocks=3)
    session = engine.prefill(PROMPT)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.prefill(PROMPT)
    with pytest.raises(RuntimeError, match="closed"):
        session.extend([1])
    assert session.gather_kv(0)[0] is not None
    close(apb.Engine.from_model(model, blocks=3).prefill(PROMPT).logits, session.logits)


def test_two_engines_share_a_model() -> None:
    """Sessions of two engines on one model, interleaved, do not disturb each other; the model is given back by the
    last one, however often the first is closed."""
    model = Case(1).model()
    alone = {blocks: read(Case(blocks).engine(Case(1).model()), Case(blocks)) for blocks in (2, 5)}
    engines = {blocks: Case(blocks).engine(model) for blocks in (2, 5)}
    sessions = {blocks: engine.prefill(PROMPT) for blocks, engine in engines.items()}
    for token, row in zip(ANSWER, range(len(ANSWER)), strict=True):
        for blocks, session in sessions.items():
            assert torch.equal(session.extend([token]), alone[blocks].decoded[row])
    engines[2].close()
    engines[2].close()
    with pytest.raises(RuntimeError, match="closed"):
        engines[2].prefill(PROMPT)
    assert torch.equal(engines[5].prefill(PROMPT).logits, alone[5].logits)
    engines[5].close()
    assert model.config._attn_implementation == "eager"


# --- positions -----------------------------------------------------------------------------------------------------


def scaled(rope: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A llama whose RoPE depends on the length; 64 positions before that."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_theta": 10000.0, "original_max_position_embeddings": 64, **rope},
        max_position_embeddings=4096 if rope["rope_type"] == "longrope" else 64,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(Case(1, seed=seed).model().state_dict())
    return without_eos(model)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_length_dependent_rope(rope: str) -> None:
    """Past the original positions, dynamic and longrope frequencies are those of the whole prompt, as in
    transformers."""
    plain = transformers_logits(Case(1).model(), PROMPT.token_ids)
    expected = transformers_logits(scaled(ROPES[rope]), PROMPT.token_ids)
    assert (plain - expected).abs().max() > 0.1  # the variant matters at this length
    answer = transformers_says(scaled(ROPES[rope]), PROMPT.token_ids, 16)
    engine = apb.Engine.from_model(scaled(ROPES[rope]), strategy="full", allow_extrapolation=True)
    close(engine.prefill(PROMPT).logits, expected)
    assert engine.generate(PROMPT, max_new_tokens=16).token_ids == answer


@pytest.mark.parametrize("rope", ROPES)
def test_length_dependent_rope_forgets_the_last_prompt(rope: str) -> None:
    """What was read before, longer or shorter, leaves no trace in the frequencies."""
    prompts = [Case(1, document=document).prompt for document in (300, 101, 20, 55, 101, 300)]
    engine = apb.Engine.from_model(scaled(ROPES[rope]), strategy="full", allow_extrapolation=True)
    for prompt in prompts:
        close(engine.prefill(prompt).logits, transformers_logits(scaled(ROPES[rope]), prompt.token_ids))


@pytest.mark.parametrize("rope", ROPES)
def test_pinned_rope_sees_the_global_length(rope: str) -> None:
    """Given only early positions, the frequencies are still those of the pinned length; undone, they are local."""
    x, positions = torch.zeros(1, 10, 64), torch.arange(10)[None]
    whole = scaled(ROPES[rope]).model.rotary_emb(x, torch.arange(200)[None])
    model = scaled(ROPES[rope])
    local = model.model.rotary_emb(x, positions)
    undo = pin_length(model, lambda: 200)
    pinned = model.model.rotary_emb(x, position_ids=positions)
    undo()
    for part in range(2):
        close(pinned[part], whole[part][:, :10], 1e-6)
        assert not torch.allclose(pinned[part], local[part])
    if rope == "longrope":  # the dynamic variant goes back only for a prompt within its original positions
        close(model.model.rotary_emb(x, positions)[0], local[0], 1e-6)
