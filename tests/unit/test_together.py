"""Tokens of several sessions in one pass: what each session reads alone, by the oracle, on 1 to 3 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import apb
import families
import ropes
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from apb.hf.cache_names import OWN_NAME
from apb.session import Session, extend_together
from cases import ANSWER, CASES, check, expected, read
from together import together

# Of one model, by engines of their own; the texts are of different lengths.
SEVERAL = ("three blocks", "no prefix", "blocks of a token or two", "star", "ring")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def in_one_pass(sessions: list[Session], tokens: tuple[int, ...]) -> list[Tensor]:
    """By session logits (tokens, vocab) after each of the tokens, of which all sessions read one in each pass."""
    said: list[list[Tensor]] = [[] for _ in sessions]
    for token in tokens:
        extend_together(sessions, [token] * len(sessions))
        for session, logits in zip(sessions, said, strict=True):
            logits.append(session.logits)
    return [torch.stack(each) for each in said]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_against_the_oracle(size: int) -> None:
    """Prompts read by different strategies, one of them further on in its answer; the same on all ranks, in messages
    that are no more than those of one session. Afterwards each goes on alone."""

    def rank(group: Any) -> tuple[list[Tensor], list[Tensor], int]:
        model, names = CASES[SEVERAL[0]].model(), SEVERAL
        sessions = [CASES[name].engine(model, group).prefill(CASES[name].prompt) for name in names]
        sessions[0].extend(ANSWER[:1])
        before = len(group.sent)
        for step in range(3):
            tokens = [ANSWER[step + (number == 0)] for number in range(len(names))]
            extend_together(sessions, tokens)
        messages = len(group.sent) - before
        assert not any(session.captured for session in sessions)
        logits = [session.logits for session in sessions]
        return logits, [session.extend(ANSWER[4:]) for session in sessions[:1]], messages

    first, *others = together(rank, size)
    for number, (name, logits) in enumerate(zip(SEVERAL, first[0], strict=True)):
        torch.testing.assert_close(logits, expected(name)[1][2 + (number == 0)], **CLOSE)
    torch.testing.assert_close(first[1][0], expected(SEVERAL[0])[1][4], **CLOSE)
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(other[0], first[0], strict=True))
    # Of three tokens, to each rank: each layer's partial results, where there are several, and the logits.
    assert first[2] == 3 * (3 * size * (size > 1) + size)


def test_the_cache_is_what_each_would_have() -> None:
    """Keys and values in document order, and all that is read afterwards."""
    name, model = SEVERAL[0], CASES[SEVERAL[0]].model()
    engine = CASES[name].engine(model)
    one, other = (engine.prefill(CASES[name].prompt) for _ in range(2))
    extend_together([one, other], [3, 4])
    apart = [engine.prefill(CASES[name].prompt) for _ in range(2)]
    for session, alone, token in zip((one, other), apart, (3, 4), strict=True):
        alone.extend([token])
        assert session.token_ids == alone.token_ids
        for layer in range(3):
            for mine, wanted in zip(session.gather_kv(layer), alone.gather_kv(layer), strict=True):
                torch.testing.assert_close(mine, wanted, **CLOSE)
        torch.testing.assert_close(session.extend([5, 6]), alone.extend([5, 6]), **CLOSE)


SHORT = 9  # tokens of a text that is shorter than any window
TOGETHER = [name for name in families.PECULIAR if name not in ("deepseek_v3", "falcon_h1", "qwen3_5_text")]


@pytest.mark.parametrize("family", TOGETHER)
def test_peculiar_layers(family: str) -> None:
    """Windows by each row's own position, experts, caps, sinks, shared keys, factors by position: a long text read in
    blocks, one that is shorter than the windows, and one a little longer, against the oracle and transformers."""
    model = families.make(*families.PECULIAR[family])
    tokens, answer = families.PROMPT.token_ids, families.ANSWER
    lengths = (SHORT, families.WINDOW + 3)
    with torch.no_grad():
        wanted = [model(torch.tensor([[*tokens[:n], *answer]])).logits[0, n:] for n in lengths]
    approximate = apb.Engine.from_model(model, verify=False, **families.APB)
    exact = approximate.exactly()
    sessions = [approximate.prefill(families.PROMPT)]
    sessions += [exact.prefill(apb.Prompt.from_tokens((), tokens[: n - 1], tokens[n - 1 : n])) for n in lengths]
    assert all(session.why_alone is None for session in sessions)
    said = in_one_pass(sessions, answer)
    for logits, right in zip(said, [families.expected(family, "apb")[1:], *wanted], strict=True):
        torch.testing.assert_close(logits, right, **CLOSE)


def test_windows_on_two_ranks() -> None:
    """Where the shard of a rank may hold nothing that a row sees."""

    models = [families.make(*families.PECULIAR["gemma3_text"]) for _ in range(2)]

    def rank(group: Group) -> list[Tensor]:
        engine = apb.Engine.from_model(models[group.rank], mesh=Mesh.of(group), verify=False, **families.APB)
        short = apb.Prompt.from_tokens((), families.PROMPT.document[:20], families.PROMPT.query)
        sessions = [engine.prefill(prompt) for prompt in (families.PROMPT, short)]
        alone = engine.prefill(short)
        right = torch.stack([alone.extend([token]) for token in families.ANSWER])
        return [*in_one_pass(sessions, families.ANSWER), right]

    for said, other, right in together(rank, 2):
        torch.testing.assert_close(said, families.expected("gemma3_text", "apb")[1:], **CLOSE)
        torch.testing.assert_close(other, right, **CLOSE)


@pytest.mark.parametrize("method", ["pages", "squeezed"])
def test_each_by_its_own_decode_method(method: str) -> None:
    """One session attends to a part of its keys, the other one to all."""
    model, case = CASES["ring"].model(), CASES["ring"]
    engines = [case.engine(model, decoding=method, share=0.5), case.engine(model)]
    sessions, apart = ([engine.prefill(case.prompt) for engine in engines] for _ in range(2))
    said = in_one_pass(sessions, ANSWER)
    for logits, session, alone in zip(said, sessions, apart, strict=True):
        torch.testing.assert_close(logits, torch.stack([alone.extend([token]) for token in ANSWER]), **CLOSE)
        assert session.share == alone.share
    assert sessions[0].share < 1 == sessions[1].share


def test_a_window_longer_than_one_text() -> None:
    """To that text it is none, so its decode method chooses keys there, whatever the other texts' lengths are."""
    model = families.make("MistralForCausalLM", {**families.SMALL, "sliding_window": 200})
    engine = apb.Engine.from_model(model, strategy="full", verify=False, decoding="pages", share=0.3)
    prompts = [apb.Prompt.from_tokens((), [7 * i % families.VOCABULARY for i in range(n)], (5,)) for n in (150, 250)]
    sessions, apart = ([engine.prefill(prompt) for prompt in prompts] for _ in range(2))
    for logits, session, alone in zip(in_one_pass(sessions, ANSWER), sessions, apart, strict=True):
        torch.testing.assert_close(logits, torch.stack([alone.extend([token]) for token in ANSWER]), **CLOSE)
        assert session.share == alone.share
    assert sessions[0].share < 1 == sessions[1].share


def test_models_that_are_read_alone() -> None:
    """Those whose rows depend on each other, or on one length; each says why."""
    reasons = {
        "state": families.make(*families.PECULIAR["falcon_h1"]),
        "expanded from what": families.make(*families.PECULIAR["deepseek_v3"]),
        "keys and values are expanded": families.make(*families.REPEATING),
        "type longrope": ropes.scaled("longrope"),
        "type dynamic": ropes.scaled("dynamic"),
    }
    for reason, model in reasons.items():
        engine = apb.Engine.from_model(model, strategy="full", verify=False)
        assert reason in str(engine.prefill(ropes.prompt_of(20)).why_alone)


def test_a_model_that_counts_tokens() -> None:
    """What it counts would be wrong for all sessions but one: the pass fails, and later ones are not tried."""
    model = CASES["ring"].model()
    model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: kwargs[OWN_NAME].get_seq_length() and None, with_kwargs=True
    )
    engine = CASES["ring"].engine(model)
    sessions = [engine.prefill(CASES["ring"].prompt) for _ in range(2)]
    with pytest.raises(RuntimeError, match="cannot be read in one pass: the model's code counts the tokens"):
        extend_together(sessions, [ANSWER[0]] * 2)
    assert "counts the tokens" in str(sessions[0].why_alone)
    check(read(engine, CASES["ring"]), "ring")
    torch.testing.assert_close(sessions[1].extend(ANSWER[:1]), expected("ring")[1][0], **CLOSE)


@pytest.mark.parametrize("where", [0, 2])
def test_a_pass_that_fails(where: int) -> None:
    """In whichever layer: no session has changed."""
    model, case = CASES["ring"].model(), CASES["ring"]
    engine = case.engine(model)
    sessions = [engine.prefill(case.prompt) for _ in range(2)]
    with pytest.raises(apb.InputError, match="vocabulary"):
        extend_together(sessions, [ANSWER[0], 99999])
    broken = model.model.layers[where].self_attn.o_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extend_together(sessions, ANSWER[:2])
    broken.remove()
    assert [len(session.token_ids) for session in sessions] == [len(case.prompt)] * 2
    for logits in in_one_pass(sessions, ANSWER):
        torch.testing.assert_close(logits, expected("ring")[1], **CLOSE)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_numbers_that_are_none_stay_in_their_row(family: str) -> None:
    """One session's cache holds NaN: the others' logits are what they are without it, experts or not."""
    engine = apb.Engine.from_model(families.make(*families.PECULIAR[family]), strategy="full", verify=False)
    sessions = [engine.prefill(families.PROMPT) for _ in range(3)]
    right = engine.prefill(families.PROMPT).extend(families.ANSWER[:1])
    sessions[1].cache.layers[0].values[...] = float("nan")
    said = in_one_pass(sessions, families.ANSWER[:1])
    assert said[1].isnan().all()
    for number in (0, 2):
        torch.testing.assert_close(said[number][0], right, **CLOSE)
