"""The classes of decoders: transformers' own with an output head, or its text model with one put on here."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

from .cache_names import OWN_NAME, cache_of

# Text models of multimodal families that transformers has no decoder class for; a plain linear map gives their logits.
_HEADLESS = {
    "glm4v_text", "glm_ocr_text", "hunyuan_vl_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_moe_text",
    "qwen3_vl_text",
}  # fmt: skip
# Text models whose decoder class transformers knows by another mapping, or under the multimodal model around them.
_ELSEWHERE = {
    "emu3_text_model": (MODEL_FOR_CAUSAL_LM_MAPPING, "emu3"),
    "mistral4": (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, "mistral4"),
}


def decoder_class(text: Any) -> Any:
    """The class of a decoder's configuration; None if there is none."""
    if text.model_type in _HEADLESS:
        return _with_head(MODEL_MAPPING[type(text)])
    if text.model_type in _ELSEWHERE:
        mapping, name = _ELSEWHERE[text.model_type]
        return mapping[CONFIG_MAPPING[name]]
    if text.model_type == "emu3":  # of the whole
        return None
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)


def auto_knows(config: Any) -> bool:
    """True if AutoModelForCausalLM makes the decoder of a configuration, False if only its class does."""
    return config.model_type not in _HEADLESS and config.model_type not in _ELSEWHERE


def from_config(config: Any, **options: Any) -> PreTrainedModel:
    """A decoder of a configuration, with random weights; ``options`` as of AutoModelForCausalLM.from_config."""
    if auto_knows(config):
        return AutoModelForCausalLM.from_config(config, **options)
    return decoder_class(config)._from_config(config, dtype=options.get("dtype"))


class TextDecoder(PreTrainedModel, GenerationMixin):
    """A text model and its output head. Given one position per token, these models use it for all their axes."""

    base_model_prefix = "model"
    body: type[PreTrainedModel]
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.body._can_set_attn_implementation()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Any = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' own decoders: logits (1, rows, vocabulary) of all rows, of the last or of chosen ones.

        ``options``: what else the text model takes, its cache too.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, **{OWN_NAME: cache_of(output)})


@cache
def _with_head(body: type[PreTrainedModel]) -> type[TextDecoder]:
    shared = {"body": body, "config_class": body.config_class, "__module__": __name__}
    shared |= {name: getattr(body, name, None) for name in ("_no_split_modules", "_skip_keys_device_placement")}
    return type(body.__name__.removesuffix("Model") + "Decoder", (TextDecoder,), shared)
