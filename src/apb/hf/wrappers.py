"""Multimodal checkpoints, read as the text decoder inside them: images and sound have no place in a document here."""

from __future__ import annotations

import copy
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from .decoders import decoder_class

# Names of a decoder's weights in checkpoints of wrappers, old and new, by those of the decoder alone. Anchored, so that
# the weights of encoders, which may have a part of one of these names, stay unknown and are not loaded.
NAMES = {
    r"^(?:model\.)?(?:language_model|text_model|llm)\.model\.": "model.",
    r"^(?:model\.)?(?:language_model|text_model|llm)\.(lm_head|embed_out)\.": r"\1.",
    r"^(?:model\.)?(?:language_model|text_model|llm)\.": "model.",
}
# Families whose decoder alone gives the logits of the whole model for a text: compared on small random checkpoints, to
# within 3e-5 of the largest logit. Others apply a scale of their own (aya_vision, cohere2_vision), read prompts in both
# directions (paligemma), or keep experts in files as only the whole model reads them (glm4v_moe, minimax_m3_vl).
_COMPARED = {
    "aria", "cohere_compass", "deepseek_vl", "deepseek_vl_hybrid", "emu3", "exaone4_5", "fast_vlm", "fuyu", "gemma3",
    "gemma3n", "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm_ocr", "glmasr", "glmga", "got_ocr2",
    "granite_speech", "granite_speech_plus", "hunyuan_vl", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl",
    "janus", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next", "llava_next_video",
    "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "mistral3", "moss_transcribe_diarize",
    "nemotron_h_omni", "ovis2", "pp_chart2table", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
    "qwen3_asr", "qwen3_vl", "qwen3_vl_moe", "shieldgemma2", "smolvlm", "vibevoice_asr", "video_llama_3", "video_llava",
    "vipllava", "voxtral",
}  # fmt: skip
# Settings of the whole checkpoint that decide how its decoder is made.
_OF_THE_WHOLE = ("tie_word_embeddings", "quantization_config")


def is_wrapper(config: Any) -> bool:
    """True if a configuration is that of a multimodal model whose text decoder transformers can load alone."""
    try:
        text = config.get_text_config()
    except ValueError:  # a text encoder beside the decoder
        return False
    if config.model_type not in _COMPARED:
        return False
    generates = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    paired = getattr(text, "is_encoder_decoder", False)
    return generates and type(text) is not type(config) and decoder_class(text) is not None and not paired


def decoder_config(config: Any) -> Any:
    """The configuration of a wrapper's text decoder; any other configuration itself."""
    if not is_wrapper(config):
        return config
    text = copy.deepcopy(config.get_text_config())
    for name in _OF_THE_WHOLE:
        if hasattr(config, name):
            setattr(text, name, getattr(config, name))
    return text
