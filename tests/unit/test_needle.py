"""The model that ships with the package, through the engine: what the demo and the model card rest on."""

from __future__ import annotations

import pytest
import torch

from apb import Engine, Prompt
from apb.evaluation.synthetic import NEEDLE_BUDGET, Setting, evaluate
from apb.evaluation.tasks import generate
from apb.hf.loading import load_model, load_tokenizer, shipped_model

LENGTH = 3000


@pytest.fixture(scope="module")
def needle():
    """The shipped model and its tokenizer, fp32 on the CPU."""
    folder = shipped_model()
    return load_model(folder, torch.float32, torch.device("cpu")), load_tokenizer(folder)


def test_full_is_transformers_own_generation(needle):
    """64 greedy tokens, past the end of the answer, are transformers' own; logits agree to 1e-4."""
    model, tokenizer = needle
    sample = generate("multikey", tokenizer, LENGTH, seed=7)
    prompt = Prompt.from_text(tokenizer, sample.document, sample.query)
    ids = torch.tensor([prompt.token_ids])
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    config_eos, model.config.eos_token_id = model.config.eos_token_id, None
    try:
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist()
            logits = model(ids).logits[0, -1]
        engine = Engine.from_model(model, tokenizer, strategy="full")
        session = engine.prefill(prompt)
        tokens = engine.generate(prompt, max_new_tokens=64).token_ids
        engine.close()
    finally:
        model.generation_config.eos_token_id, model.config.eos_token_id = eos, config_eos
    assert (session.logits - logits).abs().max().item() < 1e-4
    assert len(tokens) == 64
    assert tokens == expected


@pytest.mark.parametrize("task", ["single", "multikey", "multiquery", "headings", "variable_tracking"])
def test_apb_answers_what_full_answers(needle, task):
    """Three samples of every kind: right with full attention; in eight short blocks at most a needle or two is lost."""
    engine = Engine.from_model(*needle)
    full, apb = evaluate(engine, [task], [LENGTH], [Setting.of("full"), Setting.of("apb", blocks=8)], count=3, seed=5)
    assert full.score == 100.0
    assert apb.score > 80.0
    engine.close()


def test_what_passing_is_for(needle):
    """Notes whose headings stand in earlier blocks: nothing passed answers fewer than the question's choice."""
    engine = Engine.from_model(*needle)
    chosen = [
        Setting.of("apb", blocks=8),
        Setting.of("apb", blocks=8, passing_length=0),
        Setting.of("star", blocks=8, anchor_length=0),
    ]
    passed, nothing, alone = evaluate(engine, ["headings"], [LENGTH + NEEDLE_BUDGET], chosen, count=8, seed=6)
    engine.close()
    assert passed.score == 100.0
    assert nothing.score < 90.0
    assert alone.score < 90.0


def test_the_answer_ends_by_itself(needle):
    """The answer stops at EOS, and its text is the answer alone."""
    model, tokenizer = needle
    sample = generate("single", tokenizer, LENGTH, seed=8)
    engine = Engine.from_model(model, tokenizer, blocks=4)
    result = engine.generate(Prompt.for_model(tokenizer, sample.document, sample.query), max_new_tokens=20)
    engine.close()
    assert result.finish_reason == "stop"
    assert result.text.strip() == sample.answer
