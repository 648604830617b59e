"""Small models whose RoPE is scaled, and what transformers answers on either side of where it changes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

import apb
from families import make
from models import transformers_says

ORIGINAL = 64
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "linear": ("LlamaForCausalLM", ORIGINAL, {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ("LlamaForCausalLM", ORIGINAL, {"rope_type": "dynamic", "factor": 4.0}),
    "yarn": ("LlamaForCausalLM", ORIGINAL, YARN),
    "llama3": ("LlamaForCausalLM", 256, {**LLAMA3, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    "longrope": ("LlamaForCausalLM", 256, LONG),
    "longrope, phi3": ("Phi3ForCausalLM", 256, LONG),
}
SETTINGS = {"vocab_size": 503, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0}
ANSWER = 10
# The answer ends at the original length, one beyond it, crosses it; the prompt ends there, one beyond it, far beyond.
LENGTHS = (54, 55, 60, 64, 65, 90)


def scaled(name: str, **changed: Any) -> PreTrainedModel:
    """A model whose RoPE changes after 64 positions, of 256; so peaky that its answers do not circle."""
    kind, positions, rope = KINDS[name]
    own = {"original_max_position_embeddings": ORIGINAL} if kind.startswith("Phi3") else {}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    rope = {"rope_theta": 10000.0, **rope, **changed}
    model = make(kind, {**SETTINGS, **heads, **own, "max_position_embeddings": positions, "rope_parameters": rope})
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in part:
                weight.mul_(3)
    return model


def prompt_of(length: int) -> apb.Prompt:
    return apb.Prompt.from_tokens([5], [(37 * i + 11) % 503 for i in range(length - 3)], [41, 94])


@cache
def answer(name: str, length: int) -> list[int]:
    """What transformers generates; without a cache where that would keep longrope's short keys: see the tests of it."""
    cached = not name.startswith("longrope")
    tokens = transformers_says(scaled(name), prompt_of(length).token_ids, ANSWER, use_cache=cached)
    assert len(set(tokens)) > 6, "an answer that circles hides errors"
    return tokens
