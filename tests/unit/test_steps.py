"""Decode steps by graphs that were captured once for all sessions of an engine.

Kernels are interpreted; what stands in for graphs replays every operation from the same tensors to the same tensors.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

import apb
import families
import hybrids
from apb.decoding import Decoding, Indexed, Pages, Retrieval, Squeezed, Streamed
from apb.distributed.collectives import Group
from apb.generation import Sampling
from apb.hf.cache import ShardCache
from apb.hf.cache_names import OWN_NAME
from apb.hf.shard_layer import Arrival
from apb.kernels import chosen
from apb.passes import step
from apb.session import Session, extend_together
from models import tiny_model, without_eos
from replayed import Graph, standing_in

pytestmark = pytest.mark.triton


TOKENS = (3, 60, 41)
BLOCKS = {"strategy": "apb", "blocks": 3, "anchor_length": 9, "passing_length": 4}
# Of the families with recurrent layers those that need ordinary passes, whatever their recurrent layers do.
NOT_STEPPED = {
    "kimi_linear": "keys and values are expanded from what the cache holds",
    "lara_mini": "layers have a window",
}
WHY_NOT = step.Stepper.why_not


def prompt(document: int, seed: int = 37) -> apb.Prompt:
    return apb.Prompt.from_tokens([1, 2], [(seed * i * i + 11 * i) % 97 for i in range(document)], [5, 6, 7])


def engine(kv_heads: int = 1, **options: Any) -> apb.Engine:
    model = tiny_model("llama", heads=2, kv_heads=kv_heads, head_dim=16, layers=2)
    return apb.Engine.from_model(without_eos(model), **{**BLOCKS, **options})


def hybrid(family: str, **options: Any) -> apb.Engine:
    """An engine on a model with recurrent layers. Its experts are read by products that take no numbers of rows, which
    hold nothing yet while a capture is noted."""
    model = hybrids.make(family)
    model.set_experts_implementation("batched_mm")
    return apb.Engine.from_model(model, strategy="full", verify=False, **options)


def states_of(session: Session) -> list[Tensor]:
    """Copies of all that the states of its recurrent layers consist of."""
    return [part.clone() for _, state in sorted(session.cache.states.items()) for part in state.tensors().values()]


def read(session: Session, tokens: tuple[int, ...] = TOKENS) -> Tensor:
    """Logits (tokens, vocabulary) after each of the tokens, read one by one."""
    return torch.stack([session.extend([token]) for token in tokens])


@cache
def passes(asked: apb.Prompt) -> Tensor:
    """What an engine of its own gives by ordinary passes."""
    return read(engine(backend="torch").prefill(asked))


def close_to(actual: Tensor, wanted: Tensor) -> bool:
    return (actual - wanted).abs().max().item() < 1e-4


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Steps and graphs on the CPU; one entry for every capture."""
    made: list[torch.device] = []
    capture = step.captured

    def counted(run: Any, group: Any, device: torch.device) -> Any:
        made.append(device)
        return capture(run, group, device)

    monkeypatch.setattr(step, "captured", counted)
    monkeypatch.setattr(step.Stepper, "why_not", lambda *_: None)
    with standing_in():
        yield made


def test_one_capture_serves_all_sessions(captures: list[torch.device]) -> None:
    """Sessions one after the other and in turns, of other lengths and capacities, give what engines of their own give
    by ordinary passes, and to the bit what steps without graphs give."""
    asked = [prompt(90), prompt(61, 29), prompt(3)]
    plain = engine(graphs=False)
    without = [read(plain.prefill(each, max_new_tokens=8)) for each in asked]
    assert captures == []
    plain.close()
    ours = engine()
    for each, wanted in zip(asked, without, strict=True):
        session = ours.prefill(each, max_new_tokens=8)
        assert not session.captured
        assert torch.equal(read(session), wanted)
        assert close_to(wanted, passes(each))
        assert session.captured
    sessions = [ours.prefill(each, max_new_tokens=8 + room) for room, each in enumerate(asked)]
    turns = [[session.extend([token]) for session in sessions] for token in TOKENS]
    for logits, wanted in zip(zip(*turns, strict=True), without, strict=True):
        assert torch.equal(torch.stack(logits), wanted)
    assert len(captures) == 1


def test_a_full_cache_grows(captures: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens beyond the room, and several read at once in between, by the same graph; the cache is the one of ordinary
    passes."""
    monkeypatch.setattr(ShardCache, "growth", 2)
    asked, tokens = prompt(25), tuple(range(20, 31))
    ours, alone = engine(), engine(backend="torch")
    session, wanted = ours.prefill(asked, max_new_tokens=8), alone.prefill(asked)
    assert close_to(read(session, tokens), read(wanted, tokens))
    grown = session._cache.layers[0].keys.shape[2]
    assert grown > len(asked) + 8
    several = list(range(40, 46))  # more than there is room for
    assert session.captured
    assert close_to(session.extend(several), wanted.extend(several))
    assert not session.captured
    assert session._cache.layers[0].keys.shape[2] > grown
    assert close_to(read(session), read(wanted))
    assert len(captures) == 1
    for layer in range(2):
        for x, y in zip(session.gather_kv(layer), wanted.gather_kv(layer), strict=True):
            assert x is not None
            assert y is not None
            assert x.shape[1] == len(asked) + len(tokens) + len(several) + len(TOKENS)
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_sessions_in_one_pass(captures: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions join and leave, go back, and outgrow their room: what engines of their own give by ordinary passes. A
    number of sessions is captured once, with those up to the next power of two; whoever they are, and with steps of
    one in between. Afterwards every cache is the one of ordinary passes."""
    monkeypatch.setattr(ShardCache, "growth", 2)
    ours, alone = engine(), engine(backend="torch")
    asked = [prompt(90), prompt(3), prompt(61, 29), prompt(25)]
    sessions, apart = ([each.prefill(one, max_new_tokens=8) for one in asked] for each in (ours, alone))

    def together(*which: int) -> None:
        tokens = [20 + 3 * number + len(sessions[number].token_ids) % 7 for number in which]
        extend_together([sessions[number] for number in which], tokens)
        for number, token in zip(which, tokens, strict=True):
            assert sessions[number].captured
            assert close_to(sessions[number].logits, apart[number].extend([token]))

    for which, made in (((0, 1, 2), 1), ((2, 0, 3), 1), ((0, 1, 2, 3), 1), ((3, 1), 2), ((1,), 3), ((0, 3), 3)):
        together(*which)
        assert len(captures) == made
    for each in (sessions[1], apart[1]):
        each.rewind(len(asked[1]) + 1, each.logits)
    for each in (sessions[2], apart[2]):
        each.extend([5, 6, 7])
    for _ in range(6):
        together(2, 1, 3)
    assert close_to(sessions[3].extend([4]), apart[3].extend([4]))
    assert len(captures) == 3
    for session, wanted in zip(sessions, apart, strict=True):
        assert session.token_ids == wanted.token_ids
        for layer in range(2):
            torch.testing.assert_close(session.gather_kv(layer), wanted.gather_kv(layer), rtol=1e-4, atol=1e-4)


def test_no_capture_for_sessions_with_short_answers(captures: list[torch.device]) -> None:
    """They use a graph that longer ones have captured, and so do those of another engine that reads exactly."""
    ours = engine()
    for new_tokens, by_graph in ((7, False), (8, True), (1, True)):
        sessions = [each.prefill(prompt(25), max_new_tokens=new_tokens) for each in (ours, ours.exactly())]
        extend_together(sessions, TOKENS[:2])
        assert [session.captured for session in sessions] == [by_graph] * 2
        assert close_to(sessions[0].logits, passes(prompt(25))[0])
        assert len(captures) == by_graph


def test_a_model_that_counts_is_read_alone(captures: list[torch.device]) -> None:
    """A step of several sessions would tell it one number for all: it fails, and no session has been extended."""
    ours = engine()
    first = ours.model.model.layers[0].self_attn
    first.register_forward_pre_hook(
        lambda module, args, options: options[OWN_NAME].get_seq_length(0) and None, with_kwargs=True
    )
    asked = [prompt(25), prompt(40)]
    sessions = [ours.prefill(each, max_new_tokens=8) for each in asked]
    with pytest.raises(RuntimeError, match="cannot be read in one pass: the model's code counts the tokens"):
        extend_together(sessions, TOKENS[:2])
    assert "counts the tokens" in str(sessions[1].why_alone)
    for session, one in zip(sessions, asked, strict=True):
        assert session.token_ids == list(one.token_ids)
        assert close_to(read(session), passes(one))


def test_steps_of_always_as_many_rows(captures: list[torch.device]) -> None:
    """One capture for all engines that decode alike, and to the bit the same logits with any number beside them."""
    ours = engine()
    readers = [ours, ours.reading_by("star", blocks=3)]
    asked = [prompt(31), prompt(7)]
    sessions, again = ([r.prefill(one, max_new_tokens=8) for r, one in zip(readers, asked, strict=True)] for _ in "ab")
    extend_together(sessions, TOKENS[:2], 4)
    for session, other, token in zip(again, sessions, TOKENS[:2], strict=True):
        extend_together([session], [token], 4)
        assert torch.equal(session.logits, other.logits)
        assert session.captured
    assert len(captures) == 1
    readers[1].close()
    extend_together(sessions[1:], TOKENS[1:2], 4)  # graphs are the first one's, which is still open
    assert sessions[1].captured
    assert len(captures) == 1
    pages = ours.reading_by("full", decoding="pages")
    alone, beside = (pages.prefill(asked[1], max_new_tokens=8) for _ in range(2))
    pages.answering.together([(alone, Sampling(2)), (beside, Sampling(2))], 4)
    assert alone.captured  # by its own steps, which take one row
    assert len(captures) == 2
    for reader in (ours, pages):
        reader.close()
    anew, wanted = ours.exactly(), engine(backend="torch").exactly()  # a closed engine has no steps to share
    assert close_to(read(anew.prefill(asked[1])), read(wanted.prefill(asked[1])))


def test_layers_are_looked_at_in_later_sessions(captures: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph notes of a layer's attention is read of every session that it steps."""
    monkeypatch.setenv("APB_CHECK_FINITE", "1")
    ours = engine()
    for spoiled in (None, 1, None, 0):
        session = ours.prefill(prompt(30), max_new_tokens=8)
        if spoiled is not None:
            session._cache.layers[spoiled].values[:, :, 3] = math.nan
        assert bool(read(session).isfinite().all()) == (spoiled is None)
        where = "all layers was finite" if spoiled is None else f"layer {spoiled} was the first"
        assert where in session.what_is_not_finite(ours.group)
    assert len(captures) == 1


def test_short_answers_do_not_capture(captures: list[torch.device]) -> None:
    """They use the graph that a longer one has captured."""
    ours, wanted = engine(), passes(prompt(25))
    for new_tokens, by_graph, made in ((7, False, 0), (8, True, 1), (1, True, 1)):
        session = ours.prefill(prompt(25), max_new_tokens=new_tokens)
        assert close_to(read(session), wanted)
        assert session.captured == by_graph
        assert len(captures) == made


def test_models_whose_code_asks_for_the_length(captures: list[torch.device]) -> None:
    """What depends on a number on the host is not captured; it is told the right one at every step."""
    ours, told = engine(), []
    first = ours.model.model.layers[0].self_attn
    first.register_forward_pre_hook(
        lambda module, args, options: told.append(options[OWN_NAME].get_seq_length(0)), with_kwargs=True
    )
    asked = prompt(25)
    session = ours.prefill(asked, max_new_tokens=8)
    told.clear()
    assert close_to(read(session), passes(asked))
    assert not session.captured
    assert len(captures) == 1
    assert told[-2:] == [len(asked) + 1, len(asked) + 2]
    assert close_to(read(ours.prefill(prompt(40), max_new_tokens=8)), passes(prompt(40)))
    assert len(captures) == 1


def test_nothing_is_kept_alive(captures: list[torch.device]) -> None:
    """A session's cache goes with the session, its graph with the engine, at once. What is left says it was closed."""
    ours = engine()
    gc.collect()
    gc.disable()
    try:
        with patch.object(torch.cuda, "CUDAGraph", Remembered):
            other = ours.prefill(prompt(40), max_new_tokens=8)
            other.extend([3])
            session = ours.prefill(prompt(25), max_new_tokens=8)
            session.extend([3])
            extend_together([session, other], [4, 5])
        assert len(captures) == len(Remembered.made) == 2
        cached = [weakref.ref(x) for layer in session._cache.layers for x in (layer.keys, layer.values)]
        assert all(x() is not None for x in cached)
        del session
        assert all(x() is None for x in cached)
        assert all(made() is not None for made in Remembered.made)
        ours.close()
        assert all(made() is None for made in Remembered.made)
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="The engine was closed"):
        other.extend([3])


class Remembered(Graph):
    """Graphs that were made, weakly."""

    made: list[weakref.ref[Graph]] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        Remembered.made.append(weakref.ref(self))


def test_a_closed_engine_captures_no_more(captures: list[torch.device]) -> None:
    """Another engine still holds the model: a session of the closed one goes on, without graphs."""
    first = engine()
    second = apb.Engine.from_model(first.model, **BLOCKS)
    session = first.prefill(prompt(25), max_new_tokens=8)
    logits = [session.extend([TOKENS[0]])]
    first.close()
    logits += [session.extend([token]) for token in TOKENS[1:]]
    assert close_to(torch.stack(logits), passes(prompt(25)))
    assert not session.captured
    assert len(captures) == 1
    second.close()


@pytest.mark.parametrize("method", [Pages(0.3, page_size=5), Squeezed(0.3, cluster_size=4)], ids=lambda m: m.name)
def test_chosen_keys(captures: list[torch.device], monkeypatch: pytest.MonkeyPatch, method: Decoding) -> None:
    """One capture serves sessions with other indexes: after a return to fewer tokens, and when the cache has grown,
    with several tokens read at once in between. What they attended to is told as by ordinary passes."""
    monkeypatch.setattr(ShardCache, "growth", 2)
    monkeypatch.setattr(chosen, "CHUNKS", 2)
    ours, alone = engine(decoding=method), engine(decoding=method, backend="torch")
    for asked in (prompt(151), prompt(20), prompt(118, 29)):
        session, wanted = ours.prefill(asked, max_new_tokens=8), alone.prefill(asked)
        first = session.logits
        assert close_to(read(session), read(wanted))
        assert session.captured and session.share == wanted.share
        for each in (session, wanted):
            each.rewind(len(asked) - 9, first)
        several = list(range(40, 52))
        assert close_to(session.extend(several), wanted.extend(several))
        assert close_to(read(session), read(wanted))
        assert session.captured and session.share == wanted.share
        assert (session.share == 1.0) == (len(asked) < 64)
    assert len(captures) == 1
    (index,) = session._cache.indexes.values()
    parts = [weakref.ref(part) for layer in index.values() for part in layer.tensors().values()]
    assert len(parts) == 4
    del session, index, each
    gc.collect()
    assert not any(part() for part in parts)


@pytest.mark.parametrize(
    ("method", "here"),
    [(Retrieval(0.3), Pages(0.3)), (Retrieval(0.3, "squeezed"), Squeezed(0.3)), (Retrieval(1.0), None)],
    ids=["pages", "squeezed", "all"],
)
def test_keys_in_host_memory(
    captures: list[torch.device], monkeypatch: pytest.MonkeyPatch, method: Decoding, here: Indexed | None
) -> None:
    """One capture serves sessions with other keys there, read in place: the logits of the selector's ordinary passes
    over keys on the device, with a budget of everything exact ones. After a return to fewer tokens than are there, with
    several tokens read at once in between, and when the rest has grown."""
    monkeypatch.setattr(ShardCache, "growth", 2)
    monkeypatch.setattr(chosen, "CHUNKS", 2)
    ours, alone = engine(2, decoding=method), engine(2, decoding=here or "exact", backend="torch")
    for asked in (prompt(118, 29), prompt(20)):
        session, wanted = (each.prefill(asked, max_new_tokens=8) for each in (ours, alone))
        first = session.logits
        for back in (9, min(len(asked), 90)):
            assert close_to(read(session), read(wanted))
            assert session.captured and session.share == wanted.share
            for each in (session, wanted):
                each.rewind(len(asked) - back, first)
            several = [(7 * i) % 97 for i in range(back)]
            assert close_to(session.extend(several), wanted.extend(several))
        far = session.cache.far(0)
        assert (far is None) == (len(asked) < 64)
        assert far is None or (len(far[0]) == len(asked) - 90 and not far[0].transpose(0, 1).is_contiguous())
        assert close_to(read(session), read(wanted)) and session.captured
    assert len(captures) == 1


def test_what_is_in_host_memory_may_need_passes() -> None:
    """Of methods that have no kernels for it, and where rows are not read 16 bytes at a time."""

    def why_not(decoding: Decoding, head_dim: int) -> str:
        model = without_eos(tiny_model("llama", heads=2, kv_heads=1, head_dim=head_dim, layers=2))
        made = apb.Engine.from_model(model, decoding=Retrieval(), **BLOCKS)
        session = made.prefill(prompt(90))
        session.extend([3])
        assert session.cache.offloaded
        gpu = replace(session.cache.layout, device=torch.device("cuda"))
        with patch.object(session.cache, "layout", gpu):
            found = step.Stepper(made._decoder.attachment, decoding, made.group, graphs=True).why_not(session.cache)
        made.close()
        assert found is not None
        return found

    assert why_not(Pages(), 16) == "keys and values are in host memory"
    assert "'streamed' has no kernels" in why_not(Streamed(), 16)
    assert why_not(Retrieval(), 18) == "keys and values in host memory are read 16 bytes at a time"


@pytest.mark.parametrize("growth", [2, 256])
def test_fewer_tokens_in_upper_layers(
    captures: list[torch.device], monkeypatch: pytest.MonkeyPatch, growth: int
) -> None:
    """With propagation every layer has its own slot and length; one graph serves sessions with it and without."""
    monkeypatch.setattr(ShardCache, "growth", growth)
    tokens, kept = tuple(range(20, 31)), {"propagation": apb.Propagation(0, 0.3)}
    ours, alone = engine(**kept), engine(backend="torch", **kept)
    for asked in (prompt(40), prompt(61, 29)):
        session = ours.prefill(asked, max_new_tokens=8)
        assert session.cache.held[1] < session.cache.held[0]
        assert close_to(read(session, tokens), read(alone.prefill(asked), tokens))
        assert session.captured
    assert len(captures) == 1


def test_layers_without_keys() -> None:
    """Layers are known by their index, whether or not those before them have keys and values."""
    shard = ShardCache(3, capacity=9, keeps_new=True, total=5)
    shard.arrival = lambda layer: Arrival(slice(0, 5), (range(5),))
    shard.layers[0] = LinearAttentionLayer()
    for layer in (1, 2):
        shard.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), layer)
    shard.advance()
    assert shard.held == [0, 6, 6]
    assert shard.total == 6
    assert shard.indices == [1, 2]
    assert shard.positions(2) == [range(6)]
    assert shard.layout.heads == (None, (2, 16), (2, 16))
    keys, values = shard.layers[2].keys, shard.layers[2].values
    assert shard.addresses()[0] == (0, 0, 0)
    assert shard.addresses()[2] == (keys.data_ptr(), values.data_ptr(), 9)
    ours = engine()
    assert ours._decoder.stepper.why_not(shard) == "some layers keep no keys and values"
    ours.close()


def test_keys_that_are_expanded() -> None:
    """A captured step attends to what the cache holds, which is not what such a model attends to."""
    ours = apb.Engine.from_model(families.make(*families.REPEATING), strategy="full", verify=False)
    session = ours.prefill(families.PROMPT)
    assert "expanded from what the cache holds" in str(ours._decoder.stepper.why_not(session.cache))
    ours.close()


@pytest.mark.parametrize("family", hybrids.FAMILIES)
def test_recurrent_layers(captures: list[torch.device], family: str) -> None:
    """Two sessions take turns by one graph, and go back: the tokens and states of ordinary passes, by every family that
    has no other reason to be read by these."""

    def turns(**options: Any) -> tuple[list[list[int]], list[Tensor]]:
        reader = hybrid(family, **options)
        sessions = [reader.prefill(each, max_new_tokens=8) for each in (prompt(40), prompt(25, 29))]
        first, length = sessions[0], len(prompt(40))
        after = first.logits
        first.rewind(length, after)  # where it is, so that it can return
        logits = []
        for turn in range(4):
            if turn == 2:
                first.rewind(length, after)
                first.extend([5, 6, 7])
            for each in sessions:
                logits.append(each.extend([int(each.logits.argmax())]))
                assert each.captured == (not options)
        reader.close()
        return [each.token_ids for each in sessions], [torch.stack(logits), *map(torch.cat, parts_of(sessions))]

    def parts_of(sessions: list[Session]) -> list[list[Tensor]]:
        return [[part.flatten() for part in states_of(each)] for each in sessions]

    reader = hybrid(family)
    session = reader.prefill(prompt(25))
    gpu = replace(session.cache.layout, device=torch.device("cuda"))
    with patch.object(session.cache, "layout", gpu), patch.object(step.fused, "why_not", lambda *_: None):
        assert WHY_NOT(reader._decoder.stepper, session.cache) == NOT_STEPPED.get(family)
        session.cache.states.popitem()
        assert family in NOT_STEPPED or "read no row" in str(WHY_NOT(reader._decoder.stepper, session.cache))
    reader.close()
    if family not in NOT_STEPPED:
        tokens, found = turns()
        assert len(captures) == 1
        tokens_wanted, wanted = turns(backend="torch")
        assert tokens == tokens_wanted
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_states_without_graphs(captures: list[torch.device]) -> None:
    """Steps without graphs give what graphs do to the bit; one that fails leaves a session where it was; and what a
    document has read is nobody else's."""
    told = []
    for graphs in (True, False):
        reader = hybrid("qwen3_5_text", graphs=graphs)
        document = reader.read(tokens=prompt(40).document)
        for _ in range(2):
            session = document.prefill((5, 6), max_new_tokens=8)
            logits = [session.logits, session.extend([3])]
            before = states_of(session)
            with patch.object(Group, "broadcast", side_effect=RuntimeError("lost")), pytest.raises(RuntimeError):
                session.extend([60])
            assert all(map(torch.equal, states_of(session), before))
            logits += [session.extend([token]) for token in TOKENS[1:]]
            assert session.captured == graphs
            told.append((torch.stack(logits), *states_of(session)))
        reader.close()
    for others in told[1:]:
        assert all(map(torch.equal, others, told[0]))
    assert len(captures) == 1


@pytest.mark.parametrize("method", [Pages(0.3, page_size=5), Retrieval(0.3)], ids=lambda method: method.name)
def test_chosen_keys_beside_recurrent_layers(
    captures: list[torch.device], monkeypatch: pytest.MonkeyPatch, method: Decoding
) -> None:
    """Layers without keys have no index, and count for nothing."""
    monkeypatch.setattr(chosen, "CHUNKS", 2)
    found, wanted = (
        hybrid("lfm2", decoding=method).prefill(prompt(118, 29), max_new_tokens=8),
        hybrid("lfm2", decoding=Pages(0.3, page_size=getattr(method, "page_size", 16)), backend="torch").prefill(
            prompt(118, 29)
        ),
    )
    assert close_to(read(found), read(wanted))
    assert found.captured and found.share == wanted.share < 1
    assert len(captures) == 1
