"""Tiny decoders with random weights, for tests: peaky attention, well separated scores, logits far from uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_model(
    family: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int = 3,
    hidden: int = 64,
    vocab: int = 97,
    seed: int = 0,
) -> PreTrainedModel:
    """A fp32 model in eval mode with eager attention. `head_dim` need not be hidden / heads (Llama's own config still
    wants `hidden` to be a multiple of `heads`). The same arguments give the same weights; torch's global generator
    is left as it was. Keep three layers or more: what an anchor row sees in one layer changes block rows in
    the next, and only the layer after that shows it to the query and the cache."""
    config_class, model_class = FAMILIES[family]
    options = {"sliding_window": None} if family == "mistral" else {}
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="eager",
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        model = model_class(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("bias"):
                weight.copy_(0.5 * noise)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.copy_(1.5 + 0.3 * noise)
            elif weight.ndim == 1:  # the other norms
                weight.copy_(1.0 + 0.2 * noise)
            elif "embed_tokens" in name:
                weight.copy_(noise)
            else:  # linear: keeps the variance, times a gain that makes attention and logits peaky
                gain = 2.4 if any(part in name for part in ("q_proj", "k_proj", "lm_head")) else 1.0
                weight.copy_(gain * weight.shape[1] ** -0.5 * noise)
    return model.requires_grad_(False)


def placed(model: PreTrainedModel, gpus: int, first: int = 0) -> PreTrainedModel:
    """The same model, its layers split over so many GPUs by accelerate's map, as `from_pretrained` would put them."""
    from accelerate import dispatch_model

    from apb.hf.placement import balanced

    if gpus == 1:
        return model.to(f"cuda:{first}")
    places = {name: torch.device("cuda", first + place) for name, place in balanced(model, gpus, torch.float32).items()}
    return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def tiny_heads(model: PreTrainedModel, *, hidden: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Random retaining heads for `model` under the names of a heads file: per layer fc1 (hidden, (heads + 2 kv_heads) *
    head_dim) and fc2 (kv_heads, hidden), no bias."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        key_width = attention.k_proj.out_features
        width = attention.q_proj.out_features + 2 * key_width
        name = f"model.layers.{index}.self_attn"
        weights[f"{name}.fc1.weight"] = torch.randn(hidden, width, generator=generator) * width**-0.5
        weights[f"{name}.fc2.weight"] = torch.randn(key_width // attention.head_dim, hidden, generator=generator)
    return weights


def transformers_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """What the model itself says comes after these tokens: (vocab,)."""
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)])).logits[0, -1]


def without_eos(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which now answers as long as it is asked to."""
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def transformers_says(
    model: PreTrainedModel, token_ids: Sequence[int], tokens: int, seed: int = 0, **options: Any
) -> list[int]:
    """What transformers itself generates after these tokens, greedily unless told otherwise."""
    ids = torch.tensor([list(token_ids)])
    options = {"do_sample": False, "pad_token_id": 0, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
    return out[0, ids.shape[1] :].tolist()


def hooks(model: PreTrainedModel) -> int:
    """How many hooks stand on the model's modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
