"""Model families beside those of the oracle: `full` is transformers' own result for each, or a refusal with the reason.

What differs between them and could go wrong in silence: positions that are embedded and not rotated, biases, norms of q
and k, factors on the logits, partial rotation, layers side by side, experts, one projection for q, k and v.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apb
from families import CASES, PECULIAR, PLAIN, PROMPT, REPEATING, SMALL, VOCABULARY, WIDE, expected, make, read

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "bitnet": ("BitNetForCausalLM", SMALL),
    "cohere": ("CohereForCausalLM", SMALL),
    "cohere2": ("Cohere2ForCausalLM", SMALL),
    "deepseek_v2": ("DeepseekV2ForCausalLM", PECULIAR["deepseek_v3"][1]),
    "ernie4_5": ("Ernie4_5ForCausalLM", WIDE),
    "exaone4": ("Exaone4ForCausalLM", SMALL),
    "gemma": ("GemmaForCausalLM", WIDE),
    "gemma3_text": ("Gemma3ForCausalLM", WIDE),
    "glm4": ("Glm4ForCausalLM", WIDE),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "attn_implementation": "eager"},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", PLAIN),
    "granite": ("GraniteForCausalLM", {**SMALL, "attention_multiplier": 0.3, "residual_multiplier": 0.7}),
    "helium": ("HeliumForCausalLM", {**SMALL, "head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", {**SMALL, "num_local_experts": 4}),
    "nemotron": ("NemotronForCausalLM", WIDE),
    "olmo2": ("Olmo2ForCausalLM", SMALL),
    "olmo3": ("Olmo3ForCausalLM", SMALL),
    "opt": ("OPTForCausalLM", {**PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "phi": ("PhiForCausalLM", SMALL),
    "phi3": ("Phi3ForCausalLM", SMALL),
    "seed_oss": ("SeedOssForCausalLM", WIDE),
    "smollm3": ("SmolLM3ForCausalLM", SMALL),
    "starcoder2": ("Starcoder2ForCausalLM", SMALL),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "ALiBi": (
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "ALiBi",
    ),
    "an encoder": ("BertLMHeadModel", PLAIN, "causal"),
}


@pytest.mark.parametrize("family", EXACT)
def test_full_is_transformers(family: str) -> None:
    """Logits and a greedy answer are transformers'; and the same model runs in blocks as well."""
    model = make(*EXACT[family])
    assert model.config.model_type == family
    ids = torch.tensor([PROMPT.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :].tolist()
    engine = apb.Engine.from_model(model, strategy="full")
    torch.testing.assert_close(engine.prefill(PROMPT).logits, logits, rtol=1e-4, atol=1e-4)
    assert engine.generate(PROMPT, max_new_tokens=8).token_ids == answer
    engine.close()
    cut = apb.Engine.from_model(model, blocks=3, anchor_length=17, passing_length=4).prefill(PROMPT)
    assert cut.logits.isfinite().all()
    assert not torch.allclose(cut.logits, logits)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused(name: str) -> None:
    """A model whose attention would come out wrong is refused with its name and the reason, and left alone."""
    kind, options, reason = REFUSED[name]
    model = make(kind, options)
    before = model.config._attn_implementation
    with pytest.raises(apb.InputError, match=reason) as refusal:
        apb.Engine.from_model(model)
    assert repr(model.config.model_type) in str(refusal.value) or kind in str(refusal.value)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("family", "reading"), CASES)
def test_peculiar_layers(family: str, reading: str) -> None:
    """Windows, caps, sinks, latent attention, experts: transformers' logits where a strategy is exact, else the
    oracle's, after the prompt and through decode."""
    logits = read(make(*PECULIAR[family]), reading)
    torch.testing.assert_close(logits, expected(family, reading), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_experts_and_long_inputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense MLPs work on chunks of rows; those with experts in them are left alone."""
    monkeypatch.setattr("apb.hf.chunking.CPU_ROWS", 16)
    logits = read(make(*PECULIAR[family]), "full")
    torch.testing.assert_close(logits, expected(family, "full"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [PECULIAR["deepseek_v3"], REPEATING], ids=["deepseek_v3", "jetmoe"])
def test_what_a_cache_expands_to_in_rounds(model: tuple[str, dict[str, Any]]) -> None:
    """The cache holds latents, or fewer heads, which rounds cannot attend to: refused with the way out."""
    engine = apb.Engine.from_model(make(*model), blocks=4, rounds=2)
    with pytest.raises(apb.InputError, match=r"'(deepseek_v3|jetmoe)'.*in the cache.*latents.*one round"):
        engine.prefill(PROMPT)
