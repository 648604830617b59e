"""Families whose code has ways of its own: attention by matrix products, and tables of positions that count the cache.

Left to themselves, such models come out right in one pass and wrong on ranks, which hold a part of the cache each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apb
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from apb.hf.attach import Attachment
from apb.hf.config import kv_heads
from apb.hf.counting import model_shape
from apb.hf.products import follow_products
from apb.hf.supported import check_supported
from apb.planning.methods import make_method
from families import PROMPT, VOCABULARY, WINDOW, make
from together import together

SIZES = {"vocab_size": VOCABULARY, "attn_implementation": "eager", "pad_token_id": 0}
BART = {
    **SIZES,
    "d_model": 64,
    "encoder_layers": 4,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 512,
    "is_encoder_decoder": False,
}
PLAIN = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SIZES, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForCausalLM", BART),
    "falcon": ("FalconForCausalLM", SMALL),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            **SIZES,
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    ),
    "gptj": (
        "GPTJForCausalLM",
        {**SIZES, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    ),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", SMALL),
    "mvp": ("MvpForCausalLM", BART),
    "xglm": ("XGLMForCausalLM", {**SIZES, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
}
ALL = make_method("apb", {"blocks": 5}).lossless(5)


@cache
def says(family: str) -> tuple[Tensor, list[int]]:
    """transformers' own logits after the prompt and every token of its greedy answer, and that answer."""
    model, ids, logits = make(*OWN[family]), list(PROMPT.token_ids), []
    for _ in range(5):
        with torch.no_grad():
            logits.append(model(torch.tensor([ids])).logits[0, -1])
        ids.append(int(logits[-1].argmax()))
    return torch.stack(logits), ids[len(PROMPT) : -1]


@pytest.mark.parametrize("family", OWN)
def test_on_ranks(family: str) -> None:
    """On one rank and on several, with an answer: transformers' own logits, where everything is seen."""
    expected, answer = says(family)
    models = [make(*OWN[family]) for _ in range(3)]  # not by the ranks at once: random numbers are common to threads
    for size, strategy in ((1, "full"), (3, "ring"), (2, ALL[1] if ALL else "apb")):

        def read(group: Group) -> Tensor:
            engine = apb.Engine.from_model(models[group.rank], strategy=strategy, mesh=Mesh.of(group))  # noqa: B023
            session = engine.prefill(PROMPT)
            logits = torch.stack([session.logits, *(session.extend([token]) for token in answer)])
            engine.close()
            return logits

        for logits in together(read, size):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OWN)
def test_propagation(family: str) -> None:
    """With all rows going on, the result is still transformers'; with fewer, a model that arranges its rows as if all
    had is refused."""
    model, expected = make(*OWN[family]), says(family)[0][0]
    propagated = apb.Engine.from_model(model, strategy="full", propagation=apb.Propagation(0, 1.0))
    torch.testing.assert_close(propagated.prefill(PROMPT).logits, expected, rtol=1e-4, atol=1e-4)
    propagated.close()
    few = apb.Engine.from_model(model, blocks=4, anchor_length=16, propagation=apb.Propagation(0, 0.4))
    # Since transformers 5.24 GPT-J's attention is like most others'.
    if family == "gpt_neo" or (family == "gptj" and not model._can_set_attn_implementation()):
        with pytest.raises(apb.InputError, match="Propagation cannot select the rows of"):
            few.prefill(PROMPT)
    else:
        assert few.prefill(PROMPT).logits.isfinite().all()


@pytest.mark.parametrize("family", ["bart", "gptj"])
def test_the_model_is_given_back(family: str) -> None:
    """After the engine is closed the model is what it was; before, two engines share it."""
    model = make(*OWN[family])
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    first, second = (apb.Engine.from_model(model, strategy="full") for _ in range(2))
    first.close()
    assert second.prefill(PROMPT).logits.isfinite().all()
    second.close()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([PROMPT.token_ids])).logits[0, -1], says(family)[0][0])


def test_in_half_precision() -> None:
    """GPT-J's code, before transformers 5.24, converts queries and keys to fp32 on their way; the values stay what they
    are."""
    model = make(*OWN["gptj"]).bfloat16()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT.token_ids])).logits[0, -1].float()
    logits = apb.Engine.from_model(model, strategy="full").prefill(PROMPT).logits
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_is_followed_is_not_compiled() -> None:
    """On GPUs parts of models are compiled; what such attention calls is left as it is."""
    model = make(*OWN["gpt_neox_japanese"])
    source = vars(sys.modules[type(model).__module__])
    rotate = source["apply_rotary_pos_emb"]
    attachment = Attachment.of(model, fused=True)
    assert source["apply_rotary_pos_emb"] is rotate
    attachment.release()


@pytest.mark.parametrize(
    ("settings", "heads"),
    [({}, 1), ({"multi_query": False}, 4), ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4)],
)
def test_heads_that_falcon_keeps(settings: dict[str, Any], heads: int) -> None:
    """One with multi-query attention, else as many as there are query heads: what the cache has, and what plans say."""
    model = make("FalconForCausalLM", {**SMALL, **settings})
    keys, _ = apb.Engine.from_model(model, strategy="full").prefill(PROMPT).gather_kv(1)
    assert keys.shape[0] == heads == kv_heads(model.config) == model_shape(model.config).kv_heads


def test_a_decoder_of_a_pair_counts_its_own_layers() -> None:
    """The configuration's general names mean the encoder; attention to one, which is not there, costs nothing."""
    shape = model_shape(make(*OWN["bart"]).config)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (3, 4, 4, 16)
    assert shape.layer_parameters == 3 * (4 * 64 * 64 + 2 * 64 * 96)


STEPS: dict[str, Callable[[Any, Tensor], Any]] = {
    "adds to its scores": lambda scores, values: scores + torch.ones(()),
    "multiplies its scores by more than a number": lambda scores, values: scores * torch.ones(()),
    "takes no softmax": lambda scores, values: scores @ values,
    "softmax over dimension 1": lambda scores, values: torch.softmax(scores, 1) @ values,
    "uses masked_fill of its scores": lambda scores, values: scores.masked_fill(torch.ones(5, 7) > 0, 0.0),
    "applies cat": lambda scores, values: torch.cat([scores, scores]),
    "applies tanh": lambda scores, values: torch.tanh(scores),
    "applies where": lambda scores, values: torch.where(torch.ones(()) > 0, scores.softmax(-1), 0.0),
    "arranges its scores": lambda scores, values: scores.view(1, 2, 7, 5),
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_that_cannot_be_followed(step: str) -> None:
    """What a model does to its scores beside a scale, a mask and a softmax is refused by what it is."""

    class Odd(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return STEPS[step](q @ k.transpose(-1, -2), v)

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float
    ) -> tuple[Tensor, None]:
        return v, None

    module = Odd()
    undo = follow_products([module], lambda *given, **options: (given[3], None))
    with pytest.raises(apb.InputError, match=f"Odd.*{step}"):
        module(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 7, 4), torch.ones(1, 2, 7, 4))
    undo()
    assert "forward" not in vars(module)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "ALiBi": (
        "BloomForCausalLM",
        {**SIZES, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "'bloom'.*ALiBi",
    ),
    "Falcon's ALiBi": ("FalconForCausalLM", {**SMALL, "alibi": True}, "'falcon'.*ALiBi"),
    "attention in blocks": (
        "BigBirdForCausalLM",
        {**PLAIN, "is_decoder": True},
        "'big_bird'.*attention_type is 'original_full'",
    ),
    "an encoder": ("MegatronBertForCausalLM", PLAIN, "is not causal"),
    "no cache": (
        "OpenAIGPTLMHeadModel",
        {**SIZES, "n_embd": 64, "n_layer": 2, "n_head": 4},
        "no keys and values of earlier",
    ),
    "positions of its own": (
        "TrOCRForCausalLM",
        {**BART, "use_learned_position_embeddings": False},
        "TrOCRSinusoidalPositionalEmbedding counts positions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    """With the reason, and the model is left as it was."""
    kind, options, reason = REFUSED[name]
    model = make(kind, options)
    with pytest.raises(apb.InputError, match=reason):
        apb.Engine.from_model(model)
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in vars(module) or hasattr(module, "apb") for module in model.modules())


def test_a_pair_is_refused() -> None:
    """A configuration of encoder and decoder, with the way to say that the decoder was trained alone."""
    config = make(*OWN["bart"]).config
    config.is_encoder_decoder = True
    with pytest.raises(apb.InputError, match=r"'bart'.*encoder.*is_encoder_decoder to false"):
        check_supported(config)
