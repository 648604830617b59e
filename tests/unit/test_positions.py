"""How far RoPE reaches, and what is read across the lengths at which it changes: transformers' own numbers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Phi3ForCausalLM

import apb
from apb.evaluation.synthetic import check_lengths
from apb.hf.loading import position_limit
from models import transformers_logits, transformers_says
from ropes import ANSWER, KINDS, LENGTHS, LLAMA3, LONG, YARN, answer, prompt_of, scaled


@pytest.mark.parametrize(
    ("positions", "rope", "limit"),
    [
        (32768, {"rope_type": "default"}, 32768),
        (32768, {**YARN, "original_max_position_embeddings": 32768}, 131072),  # Qwen2.5's model card
        (40960, {**YARN, "original_max_position_embeddings": 32768}, 131072),  # Qwen3's
        (32768, YARN, 131072),
        (131072, {**YARN, "factor": 32.0, "original_max_position_embeddings": 4096}, 131072),  # gpt-oss
        (4096, {"rope_type": "linear", "factor": 4.0}, 16384),  # Vicuna's 16K
        (4096, {"rope_type": "dynamic", "factor": 2.5}, 10240),
        (131072, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),  # Llama 3.1
        (131072, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),  # Llama 3.2
        (131072, {**LONG, "original_max_position_embeddings": 4096}, 131072),  # Phi-3
        (131072, {**LONG, "factor": 64.0, "original_max_position_embeddings": 4096}, 131072),
        (32768, {**LONG, "original_max_position_embeddings": 32768}, 32768),  # MiniCPM4
    ],
)
def test_how_far_rope_reaches(positions: int, rope: dict[str, Any], limit: int) -> None:
    """Scaling counts where the configuration gives the length before it, and is not counted twice where it gives the
    one after it."""
    config = LlamaConfig(head_dim=16, max_position_embeddings=positions, rope_parameters={"rope_theta": 1e4, **rope})
    assert position_limit(config) == limit
    check_lengths([limit], config)
    with pytest.raises(apb.InputError, match=f"{limit} positions"):
        check_lengths([limit + 1], config)


def test_families_with_ways_of_their_own() -> None:
    """Gemma 3 gives its scaled length; of kinds of layers the far-sighted ones count; ALiBi has no limit."""
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    sets = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": full}
    assert position_limit(AutoConfig.for_model("gemma3_text", rope_parameters=sets)) == 131072
    olmo = {"max_position_embeddings": 8192, "layer_types": ["sliding_attention", "full_attention"]}
    sets = {**sets, "full_attention": {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 8192}}
    config = AutoConfig.for_model("olmo3", num_hidden_layers=2, rope_parameters=sets, **olmo)
    assert position_limit(config) == 32768
    assert position_limit(AutoConfig.for_model("gpt2")) == 1024
    assert position_limit(AutoConfig.for_model("mpt")) is None


BEHIND_PADDING = (
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


@pytest.mark.parametrize("family", BEHIND_PADDING)
def test_tables_that_begin_behind_the_padding(family: str) -> None:
    """Such a table has fewer positions than rows; engines find that the family comes out right, and read up to the last
    one."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    roles = {"is_decoder": True, "pad_token_id": 3, "languages": ["en"], "default_language": "en"}
    config = AutoConfig.for_model(family, vocab_size=97, max_position_embeddings=44, **sizes, **roles)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = [5 + 7 * i % 90 for i in range(40)]
    expected = transformers_logits(model, tokens)
    engine = apb.Engine.from_model(model, strategy="full")
    session = engine.prefill(apb.Prompt.from_tokens((), tokens[:30], tokens[30:38]), max_new_tokens=2)
    torch.testing.assert_close(session.extend(tokens[38:]), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(apb.InputError, match="40 positions"):
        session.extend([5])


@pytest.mark.parametrize("strategy", ["full", "ring", "ulysses"])
@pytest.mark.parametrize("name", KINDS)
def test_answers_across_the_lengths_at_which_rope_changes(name: str, strategy: str) -> None:
    """Prompt and answer on either side: transformers' greedy tokens, from one engine, in any order of lengths."""
    engine = apb.Engine.from_model(scaled(name), strategy=strategy)
    for length in (*LENGTHS, *LENGTHS[:2]):
        assert engine.generate(prompt_of(length), max_new_tokens=ANSWER).token_ids == answer(name, length), length


def test_the_switch_matters() -> None:
    """A check of the check: with the short keys kept, as by transformers' Llama, the answer that crosses is another."""
    assert transformers_says(scaled("longrope"), prompt_of(60).token_ids, ANSWER) != answer("longrope", 60)


# transformers mended this between 5.17 and 5.20, both of which we support; versions before cannot be an oracle here.
@pytest.mark.skipif(
    "next_sequence_length" not in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation),
    reason="this version of transformers drops Phi-3's cache and reads the last token alone",
)
@pytest.mark.parametrize("length", LENGTHS)
def test_phi3_reads_again_as_well(length: int) -> None:
    """transformers' own generation with its cache, which it lets go at the switch: the same answers."""
    name = "longrope, phi3"
    assert transformers_says(scaled(name), prompt_of(length).token_ids, ANSWER) == answer(name, length)


@pytest.mark.parametrize("name", ["longrope", "longrope, phi3"])
@pytest.mark.parametrize("strategy", ["full", "apb"])
def test_longrope_reads_again(name: str, strategy: str) -> None:
    """One token and several, announced or not, up to the switch and beyond it: logits and keys are those of a model
    that has the long factors from the start; with `full`, transformers' of one pass over the whole."""
    model, prompt, more = scaled(name), prompt_of(60), [7, 300, 12, 45, 96, 8, 11, 402]
    blocks = {"blocks": 3, "anchor_length": 8, "passing_length": 4} if strategy == "apb" else {}
    long = apb.Engine.from_model(scaled(name, short_factor=LONG["long_factor"]), strategy=strategy, **blocks)
    expected = long.prefill(prompt)
    expected.extend(more)
    engine = apb.Engine.from_model(model, strategy=strategy, **blocks)
    for cuts in ((1, 2, 3, 4, 5, 6, 7), (4,), (5,), (2, 6), ()):
        session = engine.prefill(prompt, max_new_tokens=1)
        assert not torch.allclose(session.gather_kv(2)[0], expected.gather_kv(2)[0][:, :60], atol=1e-2)
        for start, stop in zip((0, *cuts), (*cuts, len(more)), strict=True):
            session.extend(more[start:stop])
        assert session.token_ids == [*prompt.token_ids, *more]
        torch.testing.assert_close(session.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(session.gather_kv(2)[0], expected.gather_kv(2)[0], rtol=1e-4, atol=1e-4)
    engine.close()
    if strategy == "full":
        theirs = transformers_logits(model, [*prompt.token_ids, *more])
        torch.testing.assert_close(expected.logits, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [0, 3])
def test_scores_across_the_switch(cut: int) -> None:
    """Tokens that reach beyond the switch are scored by the long factors, as in one pass of transformers over the
    whole, and the session goes on with the short ones."""
    model, prompt, more = scaled("longrope"), prompt_of(60), [7, 300, 12, 45, 96, 8, 11, 402]
    engine = apb.Engine.from_model(model, strategy="full")
    session, untouched = engine.prefill(prompt), engine.prefill(prompt)
    for each in (session, untouched):
        if cut:
            each.extend(more[:cut])
    scores, _ = session.score(more[cut:])
    torch.testing.assert_close(session.extend([5]), untouched.extend([5]), rtol=1e-4, atol=1e-4)
    engine.close()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.token_ids, *more[:-1]]])).logits[0, cut - len(more) :]
    theirs = logits.log_softmax(-1).gather(1, torch.tensor(more[cut:]).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(scores, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["yarn", "linear", "dynamic"])
def test_scaled_lengths_are_allowed(name: str) -> None:
    """Prompt and answer may fill what the scaling makes room for, and not a token more, with the number of it."""
    engine = apb.Engine.from_model(scaled(name), strategy="full")
    session = engine.prefill(prompt_of(250), max_new_tokens=6)
    for _ in range(6):
        session.extend([7])
    with pytest.raises(apb.InputError, match="256 positions"):
        session.extend([7])
    with pytest.raises(apb.InputError, match="1 more than the model's 256"):
        engine.prefill(prompt_of(251), max_new_tokens=6)
