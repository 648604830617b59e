"""A checkpoint's generation configuration, applied by transformers' own processors and criteria.

Only this module calls the private methods by which transformers makes them; their arguments are the same from 5.17 to
5.24.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from ..errors import InputError, first_line
from .chat import end_of_turn
from .guiding import Guide

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..generation import Sampling

# Settings of search methods other than token by token, or that need several passes of the model, with the values that
# turn them off.
_LEFT_OUT: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "guidance_scale": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
}
# Settings that the caller gives instead of the checkpoint, with the values that turn them off.
_CALLERS: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "temperature": (None, 1),
    "top_k": (None, 0),
    "top_p": (None, 1),
}


def ends_turn(model: Any, tokenizer: PreTrainedTokenizerBase) -> StoppingCriteriaList | None:
    """Ends an answer at the end of the assistant's turn; None where the model's own settings already do."""
    token = end_of_turn(tokenizer)
    return None if token is None or token in eos_ids(model) else StoppingCriteriaList([EosTokenCriteria(token)])


def eos_ids(model: Any) -> list[int]:
    """The ids at which a model's answer ends, from its generation configuration, else its configuration."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def processors(
    model: Any, sampling: Sampling, prompt: Tensor, tokenizer: PreTrainedTokenizerBase | None = None
) -> LogitsProcessorList:
    """The logits processors of an answer to ``prompt`` (1, tokens), in transformers' order; a schema's needs the
    tokenizer."""
    own = _penalties(sampling, prompt)
    if sampling.schema is not None:
        own.append(Guide(sampling.schema, tokenizer, eos_ids(model), prompt.shape[1]))
    config = _config(model, sampling, prompt.shape[1], prompt.device)
    try:
        return _maker(model)._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt.shape[1],
            encoder_input_ids=prompt,
            prefix_allowed_tokens_fn=None,
            logits_processor=LogitsProcessorList([*own, *(sampling.logits_processor or ())]),
            device=str(prompt.device),
            model_kwargs={},
        )
    except Exception as error:  # the processors check their settings when they are made
        raise _wrong(error) from error


def criteria(
    model: Any, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None, device: torch.device
) -> StoppingCriteriaList:
    """The stopping criteria beside ``max_new_tokens``."""
    config = _config(model, sampling, 0, device)
    config.max_length = None
    if tokenizer is None:
        config.stop_strings = None
    try:
        asked = sampling.stopping_criteria or StoppingCriteriaList()
        return _maker(model)._get_stopping_criteria(config, asked, tokenizer)
    except Exception as error:
        raise _wrong(error) from error


def left_out(model: Any, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """One sentence that names the checkpoint's settings that an answer does not follow, or an empty list."""
    config = getattr(model, "generation_config", None)
    found = {name: getattr(config, name, None) for name in (*_LEFT_OUT, *_CALLERS)}
    wanted = {name: value for name, value in found.items() if value not in (_LEFT_OUT | _CALLERS)[name]}
    if sampling.draws:
        given = {"top_k": sampling.top_k, "top_p": sampling.top_p}
        wanted = {name: value for name, value in wanted.items() if name in _LEFT_OUT or given.get(name, 0) is None}
    elif not found["do_sample"]:
        wanted = {name: value for name, value in wanted.items() if name in _LEFT_OUT}
    stops = getattr(config, "stop_strings", None)
    if stops and tokenizer is None:
        wanted["stop_strings"] = stops
    if not wanted:
        return []
    listed = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
    return [f"Left out of the checkpoint's generation settings: {listed}."]


def own_sampling(model: Any) -> dict[str, Any]:
    """How a checkpoint would sample by itself: its temperature, top_k and top_p if it draws, else none."""
    config = getattr(model, "generation_config", None)
    if not getattr(config, "do_sample", None):
        return {}
    own = {"temperature": getattr(config, "temperature", None), "top_p": getattr(config, "top_p", None)}
    own["top_k"] = getattr(config, "top_k", None) or None
    return {"temperature": 1.0} | {name: value for name, value in own.items() if value is not None}


class _Penalties(LogitsProcessor):
    """OpenAI's penalties, which count the tokens of the answer alone."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self._prompt = prompt
        self._frequency, self._presence = frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        told = input_ids[0, self._prompt :]
        counts = torch.zeros_like(scores[0]).index_add_(0, told, torch.ones_like(told, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)  # type: ignore[return-value]


def _penalties(sampling: Sampling, prompt: Tensor) -> list[LogitsProcessor]:
    if not sampling.frequency_penalty and not sampling.presence_penalty:
        return []
    return [_Penalties(prompt.shape[1], sampling.frequency_penalty, sampling.presence_penalty)]


class _Maker(GenerationMixin):
    """Generation methods for models whose own code leaves ``generate`` out."""

    def __init__(self, config: Any) -> None:
        self.config = config


def _maker(model: Any) -> Any:
    return model if isinstance(model, GenerationMixin) else _Maker(model.config)


def _config(model: Any, sampling: Sampling, prompt: int, device: torch.device) -> Any:
    """The checkpoint's settings overridden by the caller's, as ``generate`` prepares them."""
    config = copy.deepcopy(getattr(model, "generation_config", None) or GenerationConfig())
    for name in _LEFT_OUT:
        setattr(config, name, None)
    config.do_sample = sampling.draws
    config.temperature, config.top_k, config.top_p = float(sampling.temperature), sampling.top_k, sampling.top_p
    for name in ("min_p", "repetition_penalty"):
        if (asked := getattr(sampling, name)) is not None:
            setattr(config, name, asked)
    config.max_new_tokens, config.max_length = sampling.max_new_tokens, prompt + sampling.max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = prompt + config.min_new_tokens
    config.eos_token_id = eos_ids(model) or None
    try:
        _maker(model)._prepare_special_tokens(config, device=device)
    except Exception as error:
        raise _wrong(error) from error
    return config


def _wrong(error: Exception) -> InputError:
    return InputError(
        f"The checkpoint's generation settings cannot be followed: {first_line(error)}; "
        "correct its generation_config.json."
    )
