"""Small random models of many families, and what transformers and the oracle say of a prompt: tests of any decoder."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import apb
from apb.distributed.mesh import Mesh
from apb.hf.config import head_dim
from apb.hf.modules import attention_modules
from apb.hf.verifying import small_model
from models import without_eos
from oracle import masked_prefill

# An older transformers than most tests were written with: where it does otherwise, tests ask less.
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
VOCABULARY = 503
WINDOW = 24  # of 110 tokens
ANSWER = (12, 70, 33)
PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
SMALL = {**PLAIN, "num_key_value_heads": 2}
WIDE = {**SMALL, "head_dim": 32}  # not hidden / heads
# Sliding layers in front of, between and behind others: what one kind gets wrong, the other carries on.
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# The last layers of either kind attend to the keys and values of those before them.
SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

# Its code repeats the heads that a cache holds, in an order that is not that of groups.
REPEATING = (
    "JetMoeForCausalLM",
    {**PLAIN, "num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
)

# Models whose layers differ from plain attention: what has to come out right on any number of ranks.
PECULIAR: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("Cohere2ForCausalLM", {**SMALL, **MIXED}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **PLAIN,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {
            **SMALL,
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", {**WIDE, **MIXED, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3ForCausalLM", {**WIDE, **MIXED}),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        {
            **WIDE,
            **SHARING,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        {
            **SMALL,
            **SHARING,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", {**SMALL, **MIXED, "head_dim": 16, "num_local_experts": 4}),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **SMALL,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": WINDOW,
            "floor_scale": 20,
            "attn_scale": 0.5,
        },
    ),
    # Values narrower than keys.
    "mimo_v2_flash": (
        "MiMoV2FlashForCausalLM",
        {
            **SMALL,
            **MIXED,
            "head_dim": 24,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "mistral": ("MistralForCausalLM", {**SMALL, "sliding_window": WINDOW}),
    "phimoe": ("PhimoeForCausalLM", {**SMALL, "sliding_window": WINDOW, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            **SMALL,
            **MIXED,
            "use_sliding_window": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3_5_text": (  # recurrent layers, whose runs are composed
        "Qwen3_5ForCausalLM",
        {
            **SMALL,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}
# Layers of these leave their window to the mask.
UNTOLD = {
    "llama4_text": [WINDOW, None, WINDOW],
    "phimoe": [WINDOW] * 3,
    "qwen2_moe": [WINDOW, None, WINDOW],
}
APB = {"strategy": "apb", "blocks": 5, "anchor_length": 29, "passing_length": 4}
STAR = {"strategy": "star", "blocks": 5}
READINGS: dict[str, dict[str, Any]] = {
    "full": {"strategy": "full"},
    "ring": {"strategy": "ring"},
    "ulysses": {"strategy": "ulysses"},
    "minference, all columns": {"strategy": "minference", "vertical_size": 1.0},
    "apb": APB,
    "apb, 3 rounds": {**APB, "rounds": 3},
    "star": STAR,
    "star, 2 rounds": {**STAR, "rounds": 2},
}
# What the cache of latent attention holds is not what later rounds attend to: refused.
CASES = [(f, r) for f in PECULIAR for r in READINGS if not (f == "deepseek_v3" and "rounds" in READINGS[r])]
PROMPT = apb.Prompt.from_tokens(
    [5, 96, 187],
    [(37 * i + 11) % VOCABULARY for i in range(101)],
    [(53 * i + 41) % VOCABULARY for i in range(6)],
)


def make(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """A random model of a class of transformers, its logits far from uniform, that never ends its answer."""
    kind = getattr(transformers, name)
    return without_eos(small_model(kind, kind.config_class(**options)))


def read(model: PreTrainedModel, reading: str, group: Any = None) -> Tensor:
    """Logits (1 + len(ANSWER), vocabulary): after the prompt, and after each token of ANSWER."""
    mesh = None if group is None else Mesh.of(group)
    engine = apb.Engine.from_model(model, mesh=mesh, **READINGS[reading])
    session = engine.prefill(PROMPT)
    logits = torch.stack([session.logits, *(session.extend([token]) for token in ANSWER)])
    engine.close()
    return logits


@cache
def expected(family: str, reading: str) -> Tensor:
    """What :func:`read` must give: transformers' own logits, or the oracle's."""
    model, options = make(*PECULIAR[family]), READINGS[reading]
    if options["strategy"] not in ("apb", "star"):
        with torch.no_grad():
            return model(torch.tensor([PROMPT.token_ids + ANSWER])).logits[0, len(PROMPT) - 1 :]
    sizes = {"anchor_length": None, "passing_length": 0, **options}
    sizes |= {"windows": UNTOLD.get(family), "chunked": family == "llama4_text"}
    return masked_prefill(model, PROMPT.prefix, PROMPT.document, PROMPT.query, ANSWER, **sizes)


def decode_bytes(model: PreTrainedModel, size: int) -> int:
    """What a rank of ``size`` sends while ANSWER is read: per layer and token an output row and its lse, in fp32."""
    config = model.config
    row = sum(head_dim(config, module.layer_idx) + 1 for module in attention_modules(model))
    return (size - 1) * len(ANSWER) * row * config.num_attention_heads * 4
