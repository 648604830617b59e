"""The engine on one rank: against transformers where it is exact, against the dense oracle where it is not."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import apb
from cases import ANSWER, CASES, VOCABULARY, Case, check, read
from models import FAMILIES, hooks, tiny_model, transformers_logits, transformers_says, without_eos

PROMPT = Case(1).prompt


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def llama(**options: Any) -> PreTrainedModel:
    """The model of most tests here: no EOS, so that answers are as long as they are asked to be."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY, **options)
    return without_eos(model)


def model_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that no engine has taken over."""
    config = type(model.config)(**{**model.config.to_dict(), "attn_implementation": "eager"})
    copy = type(model)(config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


# --- exact: transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_transformers(family: str) -> None:
    """`full` gives transformers' logits, and its greedy answer token for token."""
    model = without_eos(tiny_model(family, heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY))
    logits, answer = transformers_logits(model, PROMPT.token_ids), transformers_says(model, PROMPT.token_ids, 64)
    assert len(set(answer)) > 16  # an answer that circles would hide errors
    engine = apb.Engine.from_model(model, strategy="full")
    close(engine.prefill(PROMPT).logits, logits)
    result = engine.generate(PROMPT, max_new_tokens=64)
    assert result.token_ids == answer
    assert (result.finish_reason, result.exact, result.strategy) == ("length", True, "full")


@pytest.mark.parametrize("strategy", ["apb", "star"])
def test_one_block_is_full(strategy: str) -> None:
    """With one block every strategy is full attention; so it is by default for a short document."""
    model = llama()
    logits = transformers_logits(model, PROMPT.token_ids)
    for blocks in (1, None):
        session = apb.Engine.from_model(model, strategy=strategy, blocks=blocks).prefill(PROMPT)
        assert session.plan.exact
        close(session.logits, logits)


@pytest.mark.parametrize("strategy", ["full", "apb", "star", "ring", "ulysses", "minference", "auto"])
def test_the_question_in_front_as_well(strategy: str) -> None:
    """`question_first` reads prefix, query, document, query; transformers agrees where the strategy is exact."""
    model = llama()
    options: dict[str, Any] = {"blocks": 4} if strategy in ("apb", "star") else {}
    engine = apb.Engine.from_model(model, strategy=strategy, question_first=True, **options)
    session = engine.prefill(PROMPT)
    written = apb.Prompt(PROMPT.prefix + PROMPT.query, PROMPT.document, PROMPT.query)
    assert tuple(session.token_ids) == written.token_ids
    assert session.plan.to_dict()["question_first"] is True
    assert engine.generate(PROMPT, max_new_tokens=2).prompt_tokens == len(written)
    engine.close()
    plain = apb.Engine.from_model(model, strategy=strategy, **options)
    same = plain.prefill(written)
    close(session.logits, same.logits, 1e-6)
    assert "question_first" not in same.plan.to_dict()
    plain.close()
    if session.plan.exact:
        close(session.logits, transformers_logits(model, written.token_ids))


# --- approximate: the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str) -> None:
    """Logits, every layer's cache in document order, and decode are those of one dense masked softmax."""
    check(read(CASES[name].engine(), CASES[name]), name)


@pytest.mark.parametrize("name", ["five blocks", "star", "retaining, qwen3"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_against_the_oracle_with_each_backend(name: str, backend: str) -> None:
    """The back-end that is asked for is used, and changes nothing."""
    engine = CASES[name].engine(backend=backend)
    check(read(engine, CASES[name]), name)


@pytest.mark.parametrize("compressor", ["query", "query-edge"])
def test_a_budget_that_leaves_nothing_out_changes_nothing(compressor: str) -> None:
    """Logits to the bit, whether everything fits exactly or there is room to spare; with one pair less they differ."""
    options = {"blocks": 5, "anchor_length": 17, "passing_length": 6, "compressor": compressor}
    free, exact, ample, short = (
        apb.Engine.from_model(llama(), passing_budget=budget, **options).prefill(PROMPT).logits
        for budget in (None, 24, 1000, 23)
    )
    assert torch.equal(free, exact)
    assert torch.equal(free, ample)
    assert not torch.equal(free, short)


def test_prompts_do_not_influence_each_other() -> None:
    """One engine reads prompts of other lengths in between, and every one as if it were the first."""
    case = CASES["five blocks"]
    engine = case.engine()
    engine.prefill(CASES["blocks shorter than what they may pass"].prompt)
    check(read(engine, case), "five blocks")
    check(read(engine, case), "five blocks")


# --- sessions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["apb", "full"])
def test_extend_with_several_tokens_is_one_by_one(strategy: str) -> None:
    """Tokens read in one pass see each other causally: logits and cache as if they had come singly."""
    model = llama()
    sessions = [apb.Engine.from_model(model, strategy=strategy, blocks=3).prefill(PROMPT) for _ in range(2)]
    together = sessions[0].extend(ANSWER)
    for token in ANSWER:
        singly = sessions[1].extend([token])
    close(together, singly)
    assert torch.equal(sessions[0].logits, together)
    assert sessions[0].token_ids == sessions[1].token_ids == [*PROMPT.token_ids, *ANSWER]
    for layer in range(3):
        pairs = zip(sessions[0].gather_kv(layer), sessions[1].gather_kv(layer), strict=True)
        for one, other in pairs:
            assert one is not None
            assert other is not None
            assert one.shape == (2, len(PROMPT) + len(ANSWER), 16)
            close(one, other)


def test_a_session_outgrows_the_room_made_for_it() -> None:
    """More tokens may follow than room was made for, a few or many at once; earlier ones stay. Room that was made is
    enough: nothing is copied."""
    model = llama()
    tokens = [(31 * i) % VOCABULARY for i in range(600)]
    small = apb.Engine.from_model(model, blocks=3).prefill(PROMPT, max_new_tokens=1)
    large = apb.Engine.from_model(model, blocks=3).prefill(PROMPT, max_new_tokens=600)
    room = {layer.keys.shape[2] for layer in large._cache.layers}
    assert room == {len(PROMPT) + 600}
    for start, stop in itertools.pairwise((0, 100, 200, 600)):
        small.extend(tokens[start:stop])
        large.extend(tokens[start:stop])
    assert {layer.keys.shape[2] for layer in large._cache.layers} == room
    assert torch.equal(small.logits, large.logits)
    for one, other in zip(small.gather_kv(1), large.gather_kv(1), strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [[], [VOCABULARY], [5, -1]])
def test_extend_refuses_and_leaves_the_session_as_it_was(tokens: list[int]) -> None:
    """No tokens, or tokens outside the vocabulary: InputError, and the session goes on as before."""
    engine = apb.Engine.from_model(llama(), blocks=3)
    session, untouched = engine.prefill(PROMPT), engine.prefill(PROMPT)
    with pytest.raises(apb.InputError):
        session.extend(tokens)
    assert torch.equal(session.extend([5]), untouched.extend([5]))


def test_extend_takes_any_sequence_of_whole_numbers() -> None:
    """A tensor, as Prompt.from_tokens does; the session keeps Python's own numbers. Fractions are refused."""
    engine = apb.Engine.from_model(llama(), blocks=3)
    session, other = engine.prefill(PROMPT), engine.prefill(PROMPT)
    assert torch.equal(session.extend(torch.tensor([5, 6])), other.extend([5, 6]))  # type: ignore[arg-type]
    assert session.token_ids == other.token_ids
    assert all(type(token) is int for token in session.token_ids)
    for wrong in ([1.5], torch.empty(0)):
        with pytest.raises(apb.InputError, match=r"whole numbers|No tokens"):
            session.extend(wrong)  # type: ignore[arg-type]
    assert torch.equal(session.extend([7]), other.extend([7]))


@pytest.mark.parametrize("strategy", ["apb", "full"])
def test_scores_are_those_of_tokens_read_one_by_one(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of tokens that may follow, in passes of any number of rows; the session stays as it was."""
    session = apb.Engine.from_model(llama(), strategy=strategy, blocks=3).prefill(PROMPT)
    session.extend([9])
    before, keys = session.logits.clone(), [session.gather_kv(layer)[0] for layer in range(3)]
    monkeypatch.setattr("apb.session._ROWS", 2)
    best = int(before.argmax())
    scores = {tokens: session.score(tokens) for tokens in (ANSWER, ANSWER[:1], (best, 12))}
    assert torch.equal(session.logits, before)
    assert session.token_ids == [*PROMPT.token_ids, 9]
    assert all(torch.equal(keys[layer], session.gather_kv(layer)[0]) for layer in range(3))  # type: ignore[arg-type]
    assert scores[best, 12][1][0]
    assert not scores[ANSWER][1].any()
    close(scores[ANSWER][0][:1], scores[ANSWER[:1]][0])
    for token, score in zip(ANSWER, scores[ANSWER][0], strict=True):
        close(score, session.logits.double().log_softmax(-1)[token].float())
        session.extend([token])


def test_scores_of_text_longer_than_the_model_reads() -> None:
    """The last token is not read, so one token more than there are positions is scored; NaN is no score."""
    engine = apb.Engine.from_model(llama(), blocks=3)
    session = engine.prefill(PROMPT)
    room = 4096 - len(PROMPT)
    assert session.score([5] * (room + 1))[0].shape == (room + 1,)
    with pytest.raises(apb.InputError, match="1 more than the model's 4096 positions"):
        session.score([5] * (room + 2))
    session.logits[3] = torch.nan
    with pytest.raises(apb.NotFinite, match="NaN"):
        session.score([5])


@pytest.mark.parametrize("layer", [-1, 3])
def test_gather_kv_of_no_layer(layer: int) -> None:
    """A layer that the model does not have is refused with those it has."""
    session = apb.Engine.from_model(llama(), blocks=3).prefill(PROMPT)
    with pytest.raises(apb.InputError, match=r"layer -?\d.*0 to 2"):
        session.gather_kv(layer)


def test_a_session_tells_plan_and_time() -> None:
    """plan, timing, token_ids and fp32 logits (vocab,) are there after a prefill; progress counts tokens."""
    engine = apb.Engine.from_model(llama(), blocks=3)
    told: list[tuple[int, int]] = []
    session = engine.prefill(PROMPT, progress=lambda done, total: told.append((done, total)))
    assert session.plan == engine.plan(PROMPT)
    assert session.timing["prefill_s"] > 0
    assert session.token_ids == list(PROMPT.token_ids)
    assert (session.logits.shape, session.logits.dtype) == ((VOCABULARY,), torch.float32)
    total = len(PROMPT)
    assert told == [(total // 3, total), (2 * total // 3, total), (total, total)]


@pytest.mark.parametrize("strategy", ["full", "apb", "star", "ring", "minference"])
def test_a_session_gives_its_memory_back_at_once(strategy: str) -> None:
    """No cycle of references keeps a cache alive until the garbage collector runs: it may be most of a GPU."""
    blocks = 3 if strategy in ("apb", "star") else None
    engine = apb.Engine.from_model(llama(), strategy=strategy, blocks=blocks)
    gc.collect()
    gc.disable()
    try:
        session = engine.prefill(PROMPT)
        session.extend([3])
        storage = weakref.ref(session._cache.layers[0].keys)
        assert storage() is not None
        del session
        assert storage() is None
    finally:
        gc.enable()


# --- what may go wrong or be watched while a prompt is read -----------------------------------------------------------


def test_a_failed_prefill_leaves_the_engine_usable() -> None:
    """An exception in the middle of a prefill (here: of the caller's progress) spoils nothing."""
    engine = apb.Engine.from_model(llama(), blocks=3)
    expected = engine.prefill(PROMPT).logits

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.prefill(PROMPT, progress=fail)
    assert torch.equal(engine.prefill(PROMPT).logits, expected)


@pytest.mark.parametrize(("rounds", "expected"), [(1, 1), (3, 4)])
def test_reading_can_be_cancelled(rounds: int, expected: int) -> None:
    """Once the caller says so no other layer is computed, and the engine goes on as before."""
    engine = apb.Engine.from_model(llama(), blocks=3, rounds=rounds)
    layers: list[int] = []
    with pytest.raises(apb.Cancelled):
        engine.prefill(
            PROMPT, progress=lambda done, total: layers.append(done), cancelled=lambda: len(layers) == expected
        )
    assert len(layers) == expected
    assert engine.prefill(PROMPT, cancelled=lambda: False).token_ids == list(PROMPT.token_ids)


def test_progress_over_rounds_counts_every_token_once() -> None:
    """Rounds add up: it rises with every layer of every round and ends at the prompt's length."""
    engine = apb.Engine.from_model(llama(), blocks=5, rounds=2)
    told: list[int] = []
    engine.prefill(PROMPT, progress=lambda done, total: told.append(done))
    assert len(told) == 2 * 3
    assert told == sorted(set(told))
    first_round = [block for block in engine.plan(PROMPT).all_blocks() if block.round == 0]
    assert told[2] == sum(map(len, first_round))
    assert told[-1] == len(PROMPT)


# --- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["full", "apb"])
def test_bfloat16(strategy: str) -> None:
    """A bf16 model runs in bf16 (cache included), gives fp32 logits, and is about as far from fp32 as transformers'
    own bf16 is."""
    options = {"strategy": strategy, "blocks": 3, "compressor": "recent"}
    exact = apb.Engine.from_model(llama(), **options).prefill(PROMPT).logits
    model = llama().to(torch.bfloat16)
    rounded, whole = (transformers_logits(each, PROMPT.token_ids).float() for each in (model, llama()))
    session = apb.Engine.from_model(model, **options).prefill(PROMPT)
    keys, values = session.gather_kv(0)
    assert keys is not None
    assert values is not None
    assert (session.logits.dtype, keys.dtype, values.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert 0 < (session.logits - exact).abs().mean() < 2 * (rounded - whole).abs().mean()
    assert (session.logits - exact).abs().mean() < 0.1 * exact.std()


# --- refusals ------------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_too_many_positions() -> None:
    """A prompt and answer beyond the model's positions are refused, with by how much; on request they are read."""
    model = llama()
    model.config.max_position_embeddings = len(PROMPT) + 10
    engine = apb.Engine.from_model(model, blocks=3)
    engine.generate(PROMPT, max_new_tokens=10)
    with pytest.raises(apb.InputError) as refusal:
        engine.generate(PROMPT, max_new_tokens=13)
    total = len(PROMPT) + 13
    for fragment in (f"{total} positions", "3 more", str(total - 3), "allow_extrapolation"):
        assert fragment in str(refusal.value)
    session = engine.prefill(PROMPT)
    session.extend([1] * 10)
    with pytest.raises(apb.InputError, match=r"1 more than the model's .* allow_extrapolation"):
        session.extend([1])
    with pytest.raises(apb.InputError, match="at least 0, not -20"):
        engine.prefill(PROMPT, max_new_tokens=-20)
    beyond = apb.Engine.from_model(model, blocks=3, allow_extrapolation=True)
    assert len(beyond.generate(PROMPT, max_new_tokens=13).token_ids) == 13
    beyond.prefill(PROMPT).extend([1] * 11)


@pytest.mark.parametrize("strategy", ["full", "apb"])
@pytest.mark.parametrize("window", [2, 16, len(PROMPT), len(PROMPT) + 4])
def test_sliding_windows_of_any_length(window: int, strategy: str) -> None:
    """Where all layers slide nothing is approximate; a window may begin to hide tokens while an answer is generated."""
    if strategy == "apb" and window >= len(PROMPT):
        return  # nothing is out of the window's reach: such layers are approximated like any other
    config = MistralConfig(**SMALL, sliding_window=window, attn_implementation="eager")
    model = without_eos(MistralForCausalLM(config).eval())
    answer = transformers_says(model, PROMPT.token_ids, 12)
    engine = apb.Engine.from_model(model, strategy=strategy, blocks=3)
    assert engine.generate(PROMPT, max_new_tokens=12).token_ids == answer
    session = engine.prefill(PROMPT)
    with torch.no_grad():
        expected = model_copy(model)(torch.tensor([[*PROMPT.token_ids, 1, 2, 3, 4, 5]])).logits[0, -1]
    session.extend([1, 2, 3])
    close(session.extend([4, 5]), expected)


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2)),
            ["'mamba'", "no attention heads"],
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=64, d_ff=64, num_layers=2, num_heads=4)),
            ["'t5'", "not causal decoders"],
        ),
    ],
    ids=["no attention", "encoder and decoder"],
)
def test_models_that_cannot_be_taken_over(make: Any, fragments: list[str]) -> None:
    """Refused with the model's name and the reason, before anything is changed on it."""
    model = make()
    with pytest.raises(apb.InputError) as refusal:
        apb.Engine.from_model(model)
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value
    assert hooks(model) == 0
    assert model.config._attn_implementation != "apb"


@pytest.mark.parametrize(("part", "token"), list(itertools.product(["prefix", "document", "query"], [-1, VOCABULARY])))
def test_tokens_outside_the_vocabulary(part: str, token: int) -> None:
    """A token id that the model does not have is refused with the vocabulary's size, wherever it stands."""
    parts = {"prefix": [1], "document": [2, 3, 4, 5], "query": [6]}
    parts[part] = [*parts[part], token]
    engine = apb.Engine.from_model(llama(), blocks=2)
    with pytest.raises(apb.InputError, match=rf"Token id {token}\b.*vocabulary of {VOCABULARY}"):
        engine.prefill(apb.Prompt.from_tokens(**parts))


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"strategy": "magic"}, ["'magic'", "apb, full"]),
        ({"compressor": "magic"}, ["'magic'", "query"]),
        ({"strategy": "auto", "rounds": 2}, ["'auto'", "rounds"]),
        ({"compressor": "retaining"}, ["'retaining'", "none were given"]),
        ({"heads": "/nowhere/heads.pt"}, ["/nowhere/heads.pt", "does not exist"]),
        ({"backend": "magic"}, ["'magic'", "reference"]),
    ],
)
def test_wrong_options_of_an_engine(options: dict[str, Any], fragments: list[str]) -> None:
    """What is wrong with an engine's options is said when it is made, and the model is left alone."""
    model = llama()
    with pytest.raises(apb.InputError) as refusal:
        apb.Engine.from_model(model, **options)
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value
    assert model.config._attn_implementation == "eager"
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"blocks": 0}, ["Blocks", "0"]),
        ({"blocks": 102}, ["102 blocks", "101 tokens"]),
        ({"blocks": 4, "anchor_length": 8}, ["8 tokens", "at least 9"]),
        ({"blocks": 4, "passing_length": -1}, ["Passing length", "-1"]),
        ({"blocks": 4, "passing_budget": 0}, ["Passing budget", "at least 1", "0"]),
    ],
)
def test_plans_that_cannot_be_made(options: dict[str, Any], fragments: list[str]) -> None:
    """Options that make no sense are refused by the engine, sizes that do not fit a prompt before anything runs."""
    with pytest.raises(apb.InputError) as refusal:
        engine = apb.Engine.from_model(llama(), **options)
        engine.prefill(PROMPT, progress=lambda *_: pytest.fail("a layer was computed"))
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value


# --- the result ----------------------------------------------------------------------------------------------------


def test_the_result_as_plain_values() -> None:
    """`to_dict` is JSON with the fields that the command line promises."""
    engine = apb.Engine.from_model(llama(), blocks=3)
    result = engine.generate(PROMPT, max_new_tokens=5)
    report = json.loads(json.dumps(result.to_dict()))
    assert report["token_ids"] == result.token_ids
    assert report["plan"].items() >= engine.plan(PROMPT).to_dict().items()
    assert report["timing"]["decode_tokens_per_s"] == pytest.approx(5 / report["timing"]["decode_s"])
    assert report["memory"]["peak_bytes"] > 1e6
    assert report["fingerprint"]["dtype"] == "float32"


def test_without_a_tokenizer() -> None:
    """A model without tokenizer generates token ids; streaming text from it is refused."""
    engine = apb.Engine.from_model(llama(), blocks=3)
    result = engine.generate(PROMPT, max_new_tokens=5)
    assert (len(result.token_ids), result.text) == (5, "")
    with pytest.raises(apb.InputError, match="tokenizer"):
        engine.stream(PROMPT)
