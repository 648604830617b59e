"""Choosing tokens and turning them into text: transformers' own results, and the same text by every way."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
)

import apb
from apb.detokenizing import Detokenizer, Stops
from apb.generation import Sampling, decode
from byte_checkpoint import BOS, EOS, VOCABULARY, byte_tokenizer
from models import tiny_model, transformers_says, without_eos

PROMPT = apb.Prompt.from_tokens([BOS], [(37 * i + 11) % 256 for i in range(90)], [65, 66, 67])
TEXT = "naïve — 日本語 🙂👩‍👩‍👧 end."


@pytest.fixture
def model() -> PreTrainedModel:
    """A model of bytes that never ends its answer by itself."""
    return without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY))


def full(model: PreTrainedModel) -> apb.Engine:
    return apb.Engine.from_model(model, byte_tokenizer(), strategy="full")


class Say(LogitsProcessor):
    """Leaves a model no choice but to say these tokens."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - len(PROMPT)
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.token_ids[step]] = 0.0
        return forced


def saying(token_ids: list[int]) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Say(token_ids)]), "max_new_tokens": len(token_ids)}


# --- which token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9},
    ],
    ids=str,
)
def test_sampling_is_transformers(model: PreTrainedModel, options: dict[str, float]) -> None:
    """With the same seed and settings the draws are transformers' own, token for token."""
    plain = {"top_k": 0, "top_p": 1.0}  # transformers' own defaults would cut to 50
    expected = transformers_says(model, PROMPT.token_ids, 40, seed=5, do_sample=True, **{**plain, **options})
    greedy = transformers_says(model, PROMPT.token_ids, 40)
    assert expected != greedy
    assert full(model).generate(PROMPT, max_new_tokens=40, seed=5, **options).token_ids == expected


def test_seeds_are_those_of_torch() -> None:
    """Exactly the numbers that a generator of torch takes are taken."""
    for seed in (-(2**63), 2**64 - 1):
        torch.Generator().manual_seed(seed)
        assert apb.generation.Sampling(seed=seed).seed == seed
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises((RuntimeError, ValueError, OverflowError)):
            torch.Generator().manual_seed(seed)
        with pytest.raises(apb.InputError, match="seed must be"):
            apb.generation.Sampling(seed=seed)


def test_the_seed_decides(model: PreTrainedModel) -> None:
    """The same seed gives the same text, another seed another; without one every call draws anew; torch's global
    generator is neither read nor moved."""
    engine = apb.Engine.from_model(model, byte_tokenizer(), blocks=3)
    state = torch.random.get_rng_state()

    def say(seed: int | None) -> str:
        return engine.generate(PROMPT, max_new_tokens=20, temperature=1.0, seed=seed).text

    assert say(1) == say(1) != say(2)
    assert say(None) != say(None)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_temperature_zero_ignores_the_rest(model: PreTrainedModel) -> None:
    """Greedy is greedy, whatever seed, top_k and top_p say."""
    engine = apb.Engine.from_model(model, byte_tokenizer(), blocks=3)
    expected = engine.generate(PROMPT, max_new_tokens=20).token_ids
    assert engine.generate(PROMPT, max_new_tokens=20, seed=3, top_k=2, top_p=0.1).token_ids == expected


def test_repetition_penalty_of_the_model(model: PreTrainedModel) -> None:
    """A model's own repetition penalty counts, over prompt and answer, as in transformers."""
    greedy = transformers_says(model, PROMPT.token_ids, 40)
    model.generation_config.repetition_penalty = 1.6
    expected = transformers_says(model, PROMPT.token_ids, 40)
    assert expected != greedy
    assert full(model).generate(PROMPT, max_new_tokens=40).token_ids == expected


def test_processors_and_criteria_of_the_caller(model: PreTrainedModel) -> None:
    """Any of transformers' processors and stopping criteria can be added."""
    expected = transformers_says(model, PROMPT.token_ids, 40, no_repeat_ngram_size=2)
    assert expected != transformers_says(model, PROMPT.token_ids, 40)
    engine = full(model)
    processors = LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
    assert engine.generate(PROMPT, max_new_tokens=40, logits_processor=processors).token_ids == expected
    criteria = StoppingCriteriaList([MaxLengthCriteria(len(PROMPT) + 7)])
    result = engine.generate(PROMPT, max_new_tokens=40, stopping_criteria=criteria)
    assert (len(result.token_ids), result.finish_reason) == (7, "stop")


def test_processors_do_not_change_the_session(model: PreTrainedModel) -> None:
    """What processors write into the scores does not reach the session's logits."""

    class Spoil(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.zero_()

    engine = full(model)
    before = engine.prefill(PROMPT).logits
    session = engine.prefill(PROMPT)
    sampling = Sampling(max_new_tokens=1, logits_processor=LogitsProcessorList([Spoil()]))
    list(decode(session, sampling, model, engine.group))
    assert torch.equal(session.logits, before)


# --- when it ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["generation_config", "config"])
@pytest.mark.parametrize("several", [False, True])
def test_eos_ends_the_answer(model: PreTrainedModel, place: str, several: bool) -> None:
    """At an EOS, one or one of several, the answer ends with reason "stop"; the id is reported, its text is not."""
    getattr(model, place).eos_token_id = [200, EOS] if several else EOS
    result = full(model).generate(PROMPT, **saying([72, 105, EOS, 33, 33]))
    assert (result.token_ids, result.text, result.finish_reason) == ([72, 105, EOS], "Hi", "stop")


def test_an_answer_may_be_eos_alone(model: PreTrainedModel) -> None:
    """An answer that ends at once is empty, not missing."""
    model.generation_config.eos_token_id = EOS
    engine = full(model)
    result = engine.generate(PROMPT, **saying([EOS, 33]))
    assert (result.token_ids, result.text, result.finish_reason) == ([EOS], "", "stop")
    assert list(engine.stream(PROMPT, **saying([EOS, 33]))) == []


def test_the_limit_ends_the_answer(model: PreTrainedModel) -> None:
    """At max_new_tokens the reason is "length"; an EOS as the last token allowed is still "stop"."""
    model.generation_config.eos_token_id = EOS
    engine = full(model)
    assert engine.generate(PROMPT, **saying([72, 105])).finish_reason == "length"
    assert engine.generate(PROMPT, **saying([72, EOS])).finish_reason == "stop"
    assert len(engine.generate(PROMPT, max_new_tokens=1).token_ids) == 1


# --- text ----------------------------------------------------------------------------------------------------------


def drain(stream: Any) -> tuple[list[str], Any]:
    """A stream's pieces and its return value."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


def test_stream_holds_characters_together(model: PreTrainedModel) -> None:
    """Tokens that are parts of a character come out when the character is whole: no replacement signs, no empty
    pieces, and together exactly the text."""
    engine = full(model)
    token_ids = list(TEXT.encode())
    pieces, result = drain(engine.stream(PROMPT, **saying(token_ids)))
    assert "".join(pieces) == result.text == TEXT
    assert "" not in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(TEXT)
    assert engine.generate(PROMPT, **saying(token_ids)).text == TEXT
    assert result.token_ids == token_ids


def test_stream_is_generate(model: PreTrainedModel) -> None:
    """The pieces joined are `generate`'s text, with the same return value, whatever the model says."""
    engine = apb.Engine.from_model(model, byte_tokenizer(), blocks=3)
    for options in ({"max_new_tokens": 30}, {"max_new_tokens": 50, "temperature": 1.0, "seed": 4}):
        generated = engine.generate(PROMPT, **options)
        pieces, streamed = drain(engine.stream(PROMPT, **options))
        assert "".join(pieces) == generated.text == streamed.text
        assert streamed.token_ids == generated.token_ids
        assert generated.text == engine.tokenizer.decode(generated.token_ids, skip_special_tokens=True)  # type: ignore[union-attr]


def test_a_character_cut_by_the_limit_is_not_swallowed(model: PreTrainedModel) -> None:
    """Where the answer ends in the middle of a character its replacement sign is given out at the end."""
    pieces, result = drain(full(model).stream(PROMPT, **saying(list("a€".encode())[:-1])))
    assert pieces == ["a", "\ufffd"]
    assert result.text == "a\ufffd"


def test_a_stream_may_be_left(model: PreTrainedModel) -> None:
    """Whoever stops reading a stream leaves the engine as it was."""
    engine = apb.Engine.from_model(model, byte_tokenizer(), blocks=3)
    expected = engine.generate(PROMPT, max_new_tokens=10).token_ids
    stream = engine.stream(PROMPT, max_new_tokens=10)
    next(stream)
    stream.close()
    assert engine.generate(PROMPT, max_new_tokens=10).token_ids == expected


@given(st.lists(st.integers(0, 255) | st.sampled_from([EOS, *"é€🙂".encode()]), max_size=24))
def test_pieces_joined_are_the_text(token_ids: list[int]) -> None:
    """For any bytes, valid or not: the pieces joined are what the tokenizer makes of the whole."""
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token, number == len(token_ids) - 1) for number, token in enumerate(token_ids)]
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)


# --- what is asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"max_new_tokens": 0}, ["ax_new_tokens", "at least 1", "0"]),
        ({"max_new_tokens": 1.5}, ["max_new_tokens", "whole number", "1.5"]),
        ({"temperature": -0.1}, ["temperature", "-0.1"]),
        ({"temperature": math.nan}, ["temperature", "nan"]),
        ({"temperature": math.inf}, ["temperature", "inf"]),
        ({"top_k": 0}, ["op_k", "at least 1", "0"]),
        ({"seed": 2**64}, ["seed", "2**64"]),
        ({"seed": 1.5}, ["seed", "whole number", "1.5"]),
        ({"top_p": 0.0}, ["top_p", "0.0"]),
        ({"top_p": 1.1}, ["top_p", "1.1"]),
        ({"top_p": math.nan}, ["top_p", "nan"]),
    ],
)
def test_refused_settings(model: PreTrainedModel, options: dict[str, Any], fragments: list[str]) -> None:
    """Settings that mean nothing are refused with the value, before the prompt is read."""
    engine = full(model)
    for call in (engine.generate, engine.stream):
        with pytest.raises(apb.InputError) as refusal:
            call(PROMPT, progress=lambda *_: pytest.fail("a layer was computed"), **options)
        assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value


def test_unknown_settings(model: PreTrainedModel) -> None:
    """A misspelt setting is an error, never ignored."""
    with pytest.raises(TypeError, match="temprature"):
        full(model).generate(PROMPT, temprature=1.0)


def test_the_result_is_json(model: PreTrainedModel) -> None:
    """Everything in the result is a plain value, text in any language included."""
    result = full(model).generate(PROMPT, **saying(list(TEXT.encode())))
    assert json.loads(json.dumps(result.to_dict()))["text"] == TEXT


def test_stops_end_a_text_wherever_its_pieces_do() -> None:
    """The text before the first of them, with nothing told that may turn out to be its beginning."""

    def told(stop: tuple[str, ...], *pieces: str) -> tuple[list[str], bool]:
        stops = Stops(stop)
        return [stops.add(piece, piece is pieces[-1]) for piece in pieces], stops.found

    assert told(("END",), "a E", "N", "D b") == (["a ", "", ""], True)
    assert told(("END",), "a E", "N", "O") == (["a ", "", "ENO"], False)
    assert told(("c", "ab"), "xa", "bc") == (["x", ""], True)
    assert told((), "xa", "bc") == (["xa", "bc"], False)


def test_penalties_stops_and_log_probabilities() -> None:
    """Counted over the answer alone, as by hand; the answer ends before a stop; the likeliest is the greedy token."""
    engine = apb.Engine.from_model(
        tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY), byte_tokenizer(), strategy="full"
    )
    prompt = apb.Prompt((), tuple(range(40, 80)), (3, 4))
    plain = engine.generate(prompt, max_new_tokens=12, top_logprobs=2)
    assert [each.token for each in plain.scored] == [each.top[0][0] for each in plain.scored] == plain.token_ids
    assert all(each.logprob == each.top[0][1] > each.top[1][1] for each in plain.scored)
    session, told = engine.prefill(prompt, max_new_tokens=12), []
    for _ in range(12):
        scores = session.logits.clone()
        for token in told:
            scores[token] += 1.5
        for token in set(told):
            scores[token] += 0.5
        told.append(int(scores.argmax()))
        session.extend([told[-1]])
    penalised = engine.generate(prompt, max_new_tokens=12, frequency_penalty=-1.5, presence_penalty=-0.5)
    assert penalised.token_ids == told != plain.token_ids
    stop = plain.text[2:3]
    cut = engine.generate(prompt, max_new_tokens=12, stop=(stop,))
    assert cut.text == plain.text[: plain.text.index(stop)] and cut.finish_reason == "stop"


def test_a_session_goes_back() -> None:
    """What was read after the prompt is forgotten: the same tokens follow again."""
    engine = apb.Engine.from_model(
        tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY), strategy="full"
    )
    session = engine.prefill(apb.Prompt((), tuple(range(40)), (3, 4)), max_new_tokens=4)
    logits, length = session.logits, len(session.token_ids)
    after = session.extend([5, 6]).clone()
    session.rewind(length, logits)
    assert len(session.token_ids) == length and session.logits is logits
    assert torch.equal(session.extend([5, 6]), after)
