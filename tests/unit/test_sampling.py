"""What a checkpoint asks of its answers: transformers' own results, notes of the rest; scores that are no numbers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import apb
from apb.generation import Sampling, decode
from apb.hf import sampling as checkpoint
from byte_checkpoint import BOS, EOS, VOCABULARY, byte_tokenizer
from command_line import Cli
from models import tiny_model, transformers_says, without_eos

PROMPT = apb.Prompt.from_tokens([BOS], [(37 * i + 11) % 256 for i in range(90)], [65, 66, 67])
TOKENS = 16


@pytest.fixture
def model() -> PreTrainedModel:
    return without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY))


def engine(model: PreTrainedModel) -> apb.Engine:
    return apb.Engine.from_model(model, byte_tokenizer(), strategy="full")


def likely(model: PreTrainedModel, count: int = TOKENS) -> list[int]:
    """The greedy answer of a checkpoint that asks for nothing."""
    return transformers_says(model, PROMPT.token_ids, count)


# By name, each from the plain greedy answer to the settings.
GREEDY: dict[str, Any] = {
    "repetition_penalty": lambda said: {"repetition_penalty": 1.6},
    "no_repeat_ngram_size": lambda said: {"no_repeat_ngram_size": 1},
    "suppress_tokens": lambda said: {"suppress_tokens": said[2:4]},
    "begin_suppress_tokens": lambda said: {"begin_suppress_tokens": said[:1]},
    "bad_words_ids": lambda said: {"bad_words_ids": [said[1:3], said[4:5]]},
    "sequence_bias": lambda said: {"sequence_bias": [[said[:2], -30.0]]},
    "min_new_tokens": lambda said: {"eos_token_id": said[3], "min_new_tokens": 9},
    "min_length": lambda said: {"eos_token_id": said[3], "min_length": len(PROMPT) + 9},
    "exponential_decay_length_penalty": lambda said: {
        "eos_token_id": EOS,
        "exponential_decay_length_penalty": (4, 2.0),
    },
    "forced_eos_token_id": lambda said: {"forced_eos_token_id": EOS},
    "encoder_repetition_penalty": lambda said: {"encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram_size": lambda said: {"encoder_no_repeat_ngram_size": 1},
    "watermarking_config": lambda said: {"watermarking_config": {"bias": 9.0, "seeding_scheme": "selfhash"}},
    "stop_strings": lambda said: {"stop_strings": [next(chr(byte) for byte in said[2:] if 32 < byte < 127)]},
    "several": lambda said: {"no_repeat_ngram_size": 3, "suppress_tokens": said[:1], "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", GREEDY)
def test_settings_of_the_checkpoint(model: PreTrainedModel, name: str) -> None:
    """Each changes the answer, and to the answer of transformers."""
    said = likely(model)
    model.generation_config.update(**GREEDY[name](said))
    options = {"tokenizer": byte_tokenizer()} if name == "stop_strings" else {}
    expected = transformers_says(model, PROMPT.token_ids, TOKENS, **options)
    assert expected != said
    result = engine(model).generate(PROMPT, max_new_tokens=TOKENS)
    assert result.token_ids == expected
    if len(expected) < TOKENS:
        assert result.finish_reason == "stop"
    assert "notes" not in result.to_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.2},
        {"typical_p": 0.4},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.3},
        {"top_h": 0.3},
        {"renormalize_logits": True, "min_p": 0.1, "no_repeat_ngram_size": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_a_checkpoint_that_draws(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """With a temperature asked for, all that thins out the draws counts; the draws are transformers'."""
    drawn = {"temperature": 1.4, "do_sample": True, "top_k": 0, "top_p": 1.0}
    plain = transformers_says(model, PROMPT.token_ids, TOKENS, seed=5, **drawn)
    model.generation_config.update(**settings)
    expected = transformers_says(model, PROMPT.token_ids, TOKENS, seed=5, **drawn)
    assert expected != plain
    assert engine(model).generate(PROMPT, max_new_tokens=TOKENS, temperature=1.4, seed=5).token_ids == expected


@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 20, "top_p": 0.8}], ids=str)
def test_scores_are_those_of_transformers_bit_for_bit(model: PreTrainedModel, drawn: dict[str, Any]) -> None:
    """On the same logits, at every step of an answer, the processed scores are the same fp32 numbers."""
    said = likely(model)
    model.generation_config.update(
        repetition_penalty=1.3, no_repeat_ngram_size=3, suppress_tokens=said[:2], min_p=0.01, typical_p=0.9
    )
    ids = torch.tensor([PROMPT.token_ids])
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, **drawn} if drawn else {"do_sample": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **options,
        )
    processors = checkpoint.processors(model, Sampling(max_new_tokens=TOKENS, **drawn), ids)
    assert len(processors) >= 3
    for step, (logits, scores) in enumerate(zip(theirs.logits, theirs.scores, strict=True)):
        ours = processors(theirs.sequences[:, : ids.shape[1] + step], logits.clone())  # type: ignore[arg-type]
        assert ours.dtype == torch.float32
        assert torch.equal(ours, scores)


def test_a_checkpoint_does_not_decide_whether_to_draw(model: PreTrainedModel) -> None:
    """Its temperature, top_k and top_p are not followed, and a note says so; what the caller gives is."""
    said = likely(model)
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.8)
    options = {"do_sample": True, "temperature": 1.1, "top_k": 0, "top_p": 0.9}
    expected = transformers_says(model, PROMPT.token_ids, TOKENS, seed=2, **options)
    asked = engine(model)
    greedy = asked.generate(PROMPT, max_new_tokens=TOKENS)
    assert greedy.token_ids == said
    left = "Left out of the checkpoint's generation settings: do_sample=True, temperature=0.6, top_k=20, top_p=0.8."
    assert greedy.notes == greedy.to_dict()["notes"] == [left]
    drawn = asked.generate(PROMPT, max_new_tokens=TOKENS, temperature=1.1, top_p=0.9, seed=2)
    assert drawn.token_ids == expected
    assert drawn.notes == ["Left out of the checkpoint's generation settings: top_k=20."]
    assert asked.generate(PROMPT, max_new_tokens=1, temperature=1.1, top_p=0.9, top_k=3).notes == []


def test_what_is_left_out_is_named(model: PreTrainedModel) -> None:
    """Other ways to search, and stop strings where there is no tokenizer to read them with."""
    model.generation_config.update(num_beams=4, guidance_scale=1.5, stop_strings=["end"])
    tokenless = apb.Engine.from_model(model, strategy="full")
    (note,) = tokenless.generate(PROMPT, max_new_tokens=2).notes
    assert note == (
        "Left out of the checkpoint's generation settings: num_beams=4, guidance_scale=1.5, stop_strings=['end']."
    )


def test_models_that_leave_generate_out(model: PreTrainedModel) -> None:
    """Code that comes with a checkpoint may: the settings are followed all the same."""
    model.generation_config.update(no_repeat_ngram_size=1, eos_token_id=EOS, min_new_tokens=5)
    bare = SimpleNamespace(config=model.config, generation_config=model.generation_config)
    ids = torch.tensor([PROMPT.token_ids])
    for made in (checkpoint.processors, lambda *given: checkpoint.criteria(*given[:2], None, torch.device("cpu"))):
        ours, theirs = (list(map(type, made(one, Sampling(), ids))) for one in (bare, model))
        assert ours == theirs != []


def test_settings_that_mean_nothing(model: PreTrainedModel) -> None:
    """A checkpoint whose settings transformers refuses is refused, by its words."""
    model.generation_config.no_repeat_ngram_size = 1.5
    with pytest.raises(apb.InputError, match=r"generation settings cannot be followed: .*ngram_size.*config\.json\.$"):
        engine(model).generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-40, 1e-38, 1e-31, 1e-30, 1e-20, 1e-6])
def test_any_temperature_will_do(model: PreTrainedModel, temperature: float) -> None:
    """Down to the smallest positive number: the coldest are greedy."""
    said = likely(model)
    assert engine(model).generate(PROMPT, max_new_tokens=TOKENS, temperature=temperature, seed=1).token_ids == said


# --- numbers that are none -----------------------------------------------------------------------------------------


def spoiled(model: PreTrainedModel, value: float, token: int = 77) -> PreTrainedModel:
    """The model, whose scores hold that value for a token."""

    def spoil(module: object, args: object, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., token] = value
        return logits

    model.lm_head.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_numbers_end_the_answer(
    model: PreTrainedModel, value: float, drawn: dict[str, Any]
) -> None:
    """With one sentence, before the first token, however tokens are chosen."""
    asked = engine(spoiled(model, value))
    for call in (asked.generate, lambda *given, **options: list(asked.stream(*given, **options))):
        with pytest.raises(
            apb.NotFinite, match=r"^The model's scores .* 0 tokens into the answer, are NaN or inf.*\.$"
        ):
            call(PROMPT, max_new_tokens=3, **drawn)


def test_one_token_may_be_impossible(model: PreTrainedModel) -> None:
    """-infinity for some tokens is a model's right; for all of them there is nothing to choose by."""
    said = likely(model)
    assert 77 not in said
    assert engine(spoiled(model, -math.inf)).generate(PROMPT, max_new_tokens=TOKENS).token_ids == said
    session = engine(model).prefill(PROMPT)
    session.logits = torch.full_like(session.logits, -math.inf)
    with pytest.raises(apb.NotFinite):
        next(decode(session, Sampling(), model, apb.distributed.collectives.Group()))


def test_processors_may_leave_nothing_to_draw(model: PreTrainedModel) -> None:
    """Then the draw is refused; a greedy answer takes what transformers would."""

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -math.inf)

    processors = LogitsProcessorList([Forbid()])
    with pytest.raises(apb.NotFinite, match="no token that could be drawn"):
        engine(model).generate(PROMPT, max_new_tokens=2, temperature=1.0, logits_processor=processors)
    assert engine(model).generate(PROMPT, max_new_tokens=1, logits_processor=processors).token_ids == [0]


@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_is_named_on_request(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """The first whose attention is not finite; a whole prompt before is forgotten."""
    monkeypatch.setenv("APB_CHECK_FINITE", "1")
    asked = apb.Engine.from_model(model, byte_tokenizer(), blocks=3)
    assert len(asked.generate(PROMPT, max_new_tokens=3).token_ids) == 3
    weight = model.model.layers[layer].self_attn.v_proj.weight
    kept = weight.clone()
    with torch.no_grad():
        weight[3, 3] = math.nan
    with pytest.raises(apb.NotFinite, match=rf"the attention of layer {layer} was the first"):
        asked.generate(PROMPT, max_new_tokens=3)
    with torch.no_grad():
        weight.copy_(kept)
    spoiled(model, math.nan)
    with pytest.raises(apb.NotFinite, match="the attention of all layers was finite"):
        asked.generate(PROMPT, max_new_tokens=3)
    asked.close()
    monkeypatch.delenv("APB_CHECK_FINITE")
    with pytest.raises(apb.NotFinite, match="APB_CHECK_FINITE=1 in the environment names the layer"):
        engine(model).generate(PROMPT, max_new_tokens=3)


def test_the_command_line_says_it(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Notes on standard error and in JSON; scores that are no numbers in one line, with status 1 and no answer."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_sample": True, "num_beams": 4}))
    document = tmp_path / "document.txt"
    document.write_text("The keeper was called Maud. " * 20)
    asked = ["generate", "--model", folder, "--document", document, "--query", "Who?", "--max-new-tokens", 2]
    note = "Left out of the checkpoint's generation settings: num_beams=4, do_sample=True."
    assert f"apb: {note}\n" in cli(*asked, "--device", "cpu").err
    assert cli(*asked, "--device", "cpu", "--json").json["notes"] == [note]

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = cli(*asked, "--device", "cpu")
    assert (done.status, done.out) == (1, "")
    said = [line for line in done.err.splitlines() if line.startswith("apb: ")]
    assert len(said) == 1
    assert said[0].startswith(
        "apb: The model's scores for the next token, 0 tokens into the answer, are NaN or infinite"
    )
