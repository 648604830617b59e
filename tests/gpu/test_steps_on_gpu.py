"""Decode by CUDA graphs on an NVIDIA GPU: captured once for all sessions of an engine, and gone with it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from apb import Engine, Prompt, Segment
from apb.hf.cache import ShardCache
from apb.kernels import reference
from apb.session import extend_together
from models import tiny_model, without_eos

pytestmark = pytest.mark.gpu

Graphs = list["weakref.ref[torch.cuda.CUDAGraph]"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """The graphs that are made, weakly: one for every capture by a single rank."""
    graphs: Graphs = []

    class Remembered(torch.cuda.CUDAGraph):
        def capture_begin(self, *args: Any, **options: Any) -> None:
            graphs.append(weakref.ref(self))
            super().capture_begin(*args, **options)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Remembered)
    return graphs


def prompt(document: int, seed: int = 37) -> Prompt:
    return Prompt.from_tokens([1, 2], [(seed * i * i + 11 * i) % 97 for i in range(document)], [5, 6, 7])


def engine(dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    model = without_eos(tiny_model("llama", heads=8, kv_heads=2, head_dim=64)).to("cuda", dtype)
    return Engine.from_model(model, **{"strategy": "apb", "blocks": 4, **options})


def answer(session: Any, tokens: int) -> list[int]:
    """Greedy tokens."""
    chosen = []
    for _ in range(tokens):
        chosen.append(int(session.logits.argmax()))
        session.extend(chosen[-1:])
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_serves_all_sessions(dtype: torch.dtype, made: Graphs) -> None:
    """Sessions of several lengths, one after the other and in turns, choose the tokens that steps without graphs do;
    the first one alone captures."""
    prompts = [prompt(1003), prompt(400, 29), prompt(2500, 53)]
    plain = engine(dtype, graphs=False)
    expected = [answer(plain.prefill(each, max_new_tokens=20), 20) for each in prompts]
    plain.close()
    assert made == []
    ours = engine(dtype)
    for each, tokens in zip(prompts, expected, strict=True):
        session = ours.prefill(each, max_new_tokens=20)
        assert answer(session, 20) == tokens
        assert session.captured
        assert len(made) == 1
    sessions = [ours.prefill(each, max_new_tokens=10 + turn) for turn, each in enumerate(prompts)]
    chosen = [[answer(session, 1)[0] for session in sessions] for _ in range(20)]  # past the room of each, too
    assert [list(tokens) for tokens in zip(*chosen, strict=True)] == expected
    assert len(made) == 1
    ours.close()


def test_sessions_in_one_pass() -> None:
    """Before and after steps by graphs, over the same caches: in fp32 what each session reads by steps alone."""
    reader = engine(strategy="full", blocks=None)
    sessions, apart = (
        [reader.prefill(prompt(length), max_new_tokens=8) for length in (1003, 40, 400)] for _ in range(2)
    )
    for token in (7, 9, 11, 13):
        if token % 4 == 1:
            extend_together(sessions, [token + place for place in range(3)])
        for place, (session, alone) in enumerate(zip(sessions, apart, strict=True)):
            wanted = alone.extend([token + place])
            got = session.logits if token % 4 == 1 else session.extend([token + place])
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
            assert session.captured == (token % 4 != 1)


def test_steps_are_ordinary_passes(made: Graphs) -> None:
    """In fp32 logits of replays are those of ordinary passes by torch's kernels, and so is the cache, after it has
    grown again and again, with several tokens read at once in between."""
    tokens = [(7 * i) % 97 for i in range(30)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardCache, "growth", 3)
        outcomes = []
        for backend in ("auto", "torch"):
            reader = engine(strategy="full", blocks=None, fused=False, backend=backend)
            session = reader.prefill(prompt(1003), max_new_tokens=8)
            logits = [session.extend([token]) for token in tokens]
            logits += [session.extend(tokens[:9])] + [session.extend([token]) for token in tokens[9:15]]
            assert session.captured == (backend == "auto")
            outcomes.append((torch.stack(logits), *session.gather_kv(2)))
            reader.close()
    assert len(made) == 1
    assert outcomes[0][1].shape[1] == len(prompt(1003)) + 45
    for found, wanted in zip(*outcomes, strict=True):
        assert (found - wanted).abs().max().item() < 1e-3


def test_short_answers_do_not_capture(made: Graphs) -> None:
    """They use the graph that a longer one has captured."""
    ours = engine(fused=False)
    for new_tokens, by_graph, graphs in ((4, False, 0), (8, True, 1), (4, True, 1)):
        session = ours.prefill(prompt(1003), max_new_tokens=new_tokens)
        answer(session, new_tokens)
        assert session.captured == by_graph
        assert len(made) == graphs
    ours.close()


def private_bytes() -> int:
    """Memory that graphs hold, or that nothing has given back since they did."""
    ordinary = (0, 0)
    torch.cuda.empty_cache()
    return sum(
        part["total_size"] for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != ordinary
    )


def test_nothing_is_kept_alive(made: Graphs) -> None:
    """A session's cache goes with the session, graphs and their memory with the engine: at once, without Python's
    collector."""
    gc.collect()
    held = private_bytes()
    ours = engine()
    session = ours.prefill(prompt(1003), max_new_tokens=8)
    answer(session, 3)
    gc.collect()
    gc.disable()
    try:
        assert private_bytes() > held
        cached = [weakref.ref(x) for layer in session._cache.layers for x in (layer.keys, layer.values)]
        size, before = session.cache_bytes(), torch.cuda.memory_allocated()
        del session
        assert all(x() is None for x in cached)
        assert before - torch.cuda.memory_allocated() >= size
        other = ours.prefill(prompt(400), max_new_tokens=8)
        answer(other, 3)
        assert len(made) == 1
        assert made[0]() is not None
        ours.close()
        assert made[0]() is None
        assert private_bytes() == held
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="The engine was closed"):
        other.extend([3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 1, 64), (6, 3, 80)])
def test_a_graph_serves_every_cache(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Captured once, the kernels append to and read whatever cache the table names; what lies behind is not read, and
    nothing but the slot is written."""
    from apb.kernels import decode

    torch.manual_seed(0)
    table = torch.zeros(2, 3, dtype=torch.long, device="cuda")
    slot, length = torch.zeros(1, dtype=torch.long, device="cuda"), torch.ones(1, dtype=torch.int32, device="cuda")

    def storages(capacity: int) -> list[Tensor]:
        return [torch.full((kv_heads, capacity, head_dim), torch.nan, device="cuda", dtype=dtype) for _ in range(4)]

    def place(caches: list[Tensor], held: int) -> None:
        addresses = [x.data_ptr() for x in caches]
        table.copy_(torch.tensor([[*addresses[:2], caches[0].shape[1]], [*addresses[2:], caches[2].shape[1]]]))
        slot.fill_(held)
        length.fill_(held + 1)

    def step() -> list[Tensor]:
        results: list[Tensor] = []
        for layer in range(2):
            decode.append(k[layer], v[layer], table, layer, slot)
            results += decode.cached_attention(q, table, layer, kv_heads, 0.1, length, partial=True)
        return results

    q = torch.randn(1, heads, head_dim, device="cuda").to(dtype)
    k, v = (torch.randn(2, kv_heads, head_dim, device="cuda").to(dtype) for _ in "kv")
    caches = storages(5)
    place(caches, 0)
    step()  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for capacity, held in ((7, 6), (100_003, 99_999), (1000, 0), (64, 63)):
        caches = storages(capacity)
        for x in caches:
            x[:, :held] = torch.randn(kv_heads, held, head_dim, device="cuda").to(dtype)
        wanted = [x.clone() for x in caches]
        for x, new in zip(wanted, (k[0], v[0], k[1], v[1]), strict=True):
            x[:, held] = new
        place(caches, held)
        graph.replay()
        for x, y in zip(caches, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        for layer in range(2):
            pair = (x[:, : held + 1].transpose(0, 1).float() for x in wanted[2 * layer : 2 * layer + 2])
            out, lse = reference.attention(q.float(), [Segment(*pair)], 0.1)
            assert ((results[2 * layer] - out).norm() / out.norm()).item() < 1e-4
            assert (results[2 * layer + 1] - lse).abs().max().item() < 1e-4
