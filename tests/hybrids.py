"""Small random models of every family with recurrent layers that works."""

from __future__ import annotations

import copy
from functools import cache
from threading import Lock
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from apb.hf.cache_names import cache_of
from apb.hf.verifying import small_model
from families import VOCABULARY, WINDOW
from models import without_eos

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# Recurrent layers before and behind attention: what a state gets wrong, the layers above carry on.
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 32}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**DELTA, **EXPERTS},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS},
    "olmo_hybrid": DELTA,
    "kimi_linear": {
        **LOCAL_EXPERTS, "layer_types": DELTA["layer_types"], "linear_num_heads": 2, "linear_head_dim": 16,
        "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 8, "mamba_d_state": 8},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 32,
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
    },
    "granitemoehybrid": {
        **MAMBA, **LOCAL_EXPERTS, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 32,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},  # every layer attends and recurs
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "zamba2": {  # two layers attend by the same weights
        "mamba_d_state": 16, "mamba_headdim": 32, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 32,
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1,
        "adapter_rank": 8, "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
    },
    "minimax": {**LOCAL_EXPERTS, "layer_types": DELTA["layer_types"], "block_size": 32},
    "lfm2": CONV,
    "lfm2_moe": {**CONV, **EXPERTS, "num_dense_layers": 1},
    "lfm3": CONV,
    "lara_mini": {
        **DELTA, **EXPERTS, "sliding_window": WINDOW, "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "sliding_attention", "linear_attention", "full_attention"],
    },
}  # fmt: skip
# The oldest transformers that the suite runs with lacks some.
FAMILIES = {name: options for name, options in FAMILIES.items() if name in CONFIG_MAPPING}

_ONE_BY_ONE = Lock()  # models made at once by several threads would share the seeded numbers


@cache
def _made(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    config._attn_implementation = "eager"
    model = without_eos(small_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config))
    for module in model.modules():
        if type(module).__name__.endswith("GatedDeltaNet"):
            # What fades within a few rows hides what a state gets wrong.
            module.A_log.data.sub_(torch.linspace(0, 9, len(module.A_log)))
    return model


def make(family: str) -> PreTrainedModel:
    """A model of its own every time, with the same weights."""
    with _ONE_BY_ONE:
        return copy.deepcopy(_made(family))


@cache
def says(family: str, token_ids: tuple[int, ...], more: tuple[int, ...] = ()) -> tuple[torch.Tensor, Any]:
    """transformers' own logits (1 + len(more), vocabulary) in one pass over all, and its cache after ``token_ids``."""
    model = _made(family)
    with torch.no_grad():
        logits = model(torch.tensor([[*token_ids, *more]])).logits[0, len(token_ids) - 1 :]
        known = cache_of(model(torch.tensor([token_ids]), use_cache=True))
    return logits, known
