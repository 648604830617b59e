"""What a model's code calls its cache is asked of the code: transformers renamed it in 5.24, other code has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import generic

import apb
from apb.hf import supported, verifying
from apb.hf.cache_names import OWN_NAME, cache_of, with_cache
from families import ANSWER, PROMPT, SMALL, make


class New(LlamaForCausalLM):
    """Its forward has the name of 5.24."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, cache: Any = None, **options: Any) -> Any:
        return super().forward(input_ids, position_ids=position_ids, **{OWN_NAME: cache}, **options)


class Old(LlamaForCausalLM):
    """Its forward has the name of before."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, past_key_values: Any = None, **options: Any
    ) -> Any:
        return super().forward(input_ids, position_ids=position_ids, **{OWN_NAME: past_key_values}, **options)


class Unnamed(LlamaForCausalLM):
    """Its forward passes on what it is given."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)


@pytest.mark.parametrize("kind", [New, Old, Unnamed])
def test_models_of_either_spelling_are_read(kind: type[LlamaForCausalLM]) -> None:
    """They give transformers' own logits, after the prompt and every token; so does the cache that they return."""
    model = kind(make("LlamaForCausalLM", SMALL).config).eval()
    ids = torch.tensor([PROMPT.token_ids + ANSWER])
    with torch.no_grad():
        expected = model(ids).logits[0, len(PROMPT) - 1 :]
        known = cache_of(model(ids[:, :-1], use_cache=True))
        torch.testing.assert_close(model(ids[:, -1:], **with_cache(model, known)).logits[0, -1], expected[-1])
    engine = apb.Engine.from_model(model, strategy="full")
    session = engine.prefill(PROMPT)
    logits = torch.stack([session.logits, *(session.extend([token]) for token in ANSWER)])
    engine.close()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [New, Old, Unnamed])
def test_a_model_without_a_cache_is_refused(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its cache is called; only code that names none is refused."""
    monkeypatch.setattr(supported, "decoder_class", lambda config: kind)
    if kind is Unnamed:
        with pytest.raises(apb.InputError, match="no keys and values of earlier tokens"):
            supported.check_supported(LlamaConfig())
    else:
        supported.check_supported(LlamaConfig())


@pytest.mark.filterwarnings("error::FutureWarning")
def test_nothing_is_deprecated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is compared and read, and its cache handed over, without a word of transformers' on names."""
    said: list[str] = []
    monkeypatch.setattr(generic.logger, "warning_once", said.append)
    monkeypatch.setattr(verifying, "_folder", lambda: tmp_path)  # no record says that it was compared
    monkeypatch.setattr(verifying, "_verified", set())
    model = make("LlamaForCausalLM", SMALL)
    engine = apb.Engine.from_model(model)
    session = engine.prefill(PROMPT)
    session.extend(ANSWER)
    known = session.to_dynamic_cache()
    engine.close()
    ids = torch.tensor([[*PROMPT.token_ids, *ANSWER, 1]])
    model.generate(ids, **with_cache(model, known), max_new_tokens=2, do_sample=False)
    assert not said
