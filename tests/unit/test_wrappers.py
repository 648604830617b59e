"""Multimodal checkpoints are read as the text decoder inside them, with that decoder's weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import apb
from apb.hf.loading import load_config, load_model
from apb.hf.supported import check_supported
from families import PECULIAR, PROMPT, SMALL, WIDE

CPU = torch.device("cpu")
VISION = {"hidden_size": 32, "depth": 1, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CODES = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32}
# The class of the wrapper, its decoder's settings, and its own.
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral": ("Mistral3ForConditionalGeneration", SMALL, {}),
    "gemma3_text": ("Gemma3ForConditionalGeneration", WIDE, {}),
    "llama": ("LlavaForConditionalGeneration", SMALL, {"tie_word_embeddings": True}),
    "qwen2": ("InternVLForConditionalGeneration", SMALL, {}),
    "qwen2_5_vl_text": (
        "Qwen2_5_VLForConditionalGeneration",
        {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        {},
    ),
    "mistral4": ("Mistral3ForConditionalGeneration", PECULIAR["deepseek_v3"][1], {}),
    "emu3_text_model": ("Emu3ForConditionalGeneration", SMALL, {"vocabulary_map": {"<image>": 0}}),
}


def wrapper(decoder: str) -> Any:
    """A small random multimodal model around a decoder."""
    kind, settings, options = WRAPPERS[decoder]
    whole = getattr(transformers, kind)
    text = transformers.AutoConfig.for_model(decoder, **settings)
    torch.manual_seed(0)
    sizes = {"vision_config": VISION, "vq_config": CODES}
    parts = {
        name: {**transformers.AutoConfig.for_model(part.model_type).to_dict(), **sizes[name]}
        for name in sizes
        if (part := getattr(whole.config_class(), name, None)) is not None
    }
    model = whole(whole.config_class(text_config=text, **parts, **options)).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    return model


def theirs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPT.token_ids])).logits[0, -1]


@pytest.mark.parametrize("decoder", WRAPPERS)
def test_a_wrapper_is_read_as_text(decoder: str, tmp_path: Path) -> None:
    """The logits are the whole model's of the same text, and no weight of its encoders is loaded."""
    whole = wrapper(decoder)
    whole.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert config.model_type == decoder
    check_supported(config)
    model = load_model(tmp_path, torch.float32, CPU)
    assert not any("vision" in name or "vq" in name or "projector" in name for name, _ in model.named_parameters())
    engine = apb.Engine.from_model(model, strategy="full")
    torch.testing.assert_close(engine.prefill(PROMPT).logits, theirs(whole), rtol=1e-4, atol=1e-4)


def test_a_decoder_that_is_known_by_its_class_alone(tmp_path: Path) -> None:
    """transformers' AutoModelForCausalLM does not load Mistral 4, which is one."""
    kind = transformers.Mistral4ForCausalLM
    model = kind(kind.config_class(**PECULIAR["deepseek_v3"][1])).float().eval()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(theirs(load_model(tmp_path, torch.float32, CPU)), theirs(model))


def test_names_of_newer_checkpoints(tmp_path: Path) -> None:
    """Files have the decoder's own name first, ``language_model.model``, or that of the whole, ``model``."""
    whole = wrapper("mistral")
    whole.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    others = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    for old, new in others.items():
        for name in [name for name in weights if name.startswith(old)]:
            weights[new + name.removeprefix(old)] = weights.pop(name)
    assert any(name.startswith("model.language_model.") for name in weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(theirs(load_model(tmp_path, torch.float32, CPU)), theirs(whole))


def test_weights_that_are_missing(tmp_path: Path) -> None:
    """A decoder that is not all there is refused, although other weights of the checkpoint are left out."""
    wrapper("mistral").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "language_model" in name and "q_proj" in name)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(apb.InputError, match="lacks weights"):
        load_model(tmp_path, torch.float32, CPU)


def test_a_wrapper_in_memory() -> None:
    """A whole multimodal model is refused with the way to its decoder."""
    with pytest.raises(apb.InputError, match=r"'mistral3' models are multimodal.*from_pretrained"):
        apb.Engine.from_model(wrapper("mistral"))
