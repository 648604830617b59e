"""Decode by CUDA graphs on an NVIDIA GPU: captured once for all sessions of an engine, and gone with it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import hybrids
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


@pytest.mark.parametrize("growth", [2, 256])
def test_sessions_in_one_pass(growth: int, made: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of uneven lengths that join and leave, go back, read several tokens at once and outgrow their room, by
    graphs of so many rows: in fp32 what each reads by steps alone. A number of sessions is captured once, with those up
    to the next power of two, and the caches are the same in the end."""
    monkeypatch.setattr(ShardCache, "growth", growth)
    reader = engine(strategy="full", blocks=None)
    lengths = (1003, 40, 400, 2500, 7)
    sessions, apart = ([reader.prefill(prompt(length), max_new_tokens=8) for length in lengths] for _ in range(2))
    for number, session in enumerate(apart):
        assert session.extend([number]).isfinite().all()
        extend_together([sessions[number]], [number])
        torch.testing.assert_close(sessions[number].logits, session.logits, rtol=1e-4, atol=1e-4)
    assert len(made) == 1  # one row is one row, alone or together

    def together(*which: int) -> None:
        tokens = [int(apart[number].logits.argmax()) for number in which]
        assert tokens == [int(sessions[number].logits.argmax()) for number in which]
        extend_together([sessions[number] for number in which], tokens)
        for number, token in zip(which, tokens, strict=True):
            wanted = apart[number].extend([token])
            torch.testing.assert_close(sessions[number].logits, wanted, rtol=1e-4, atol=1e-4)
            assert sessions[number].captured

    orders = {(0, 1): 2, (2, 4): 2, (3, 0, 4): 3, (0, 1, 2, 3, 4): 4, (4, 3, 1, 0): 4, (1, 2, 0): 4, (3,): 4}
    for which, graphs in orders.items():
        together(*which)
        assert len(made) == graphs
    for each in (sessions, apart):
        each[2].extend([5, 6, 7])
        each[0].rewind(len(prompt(1003)) + 2, each[0].logits)
    for _ in range(7):
        together(1, 0, 2, 4, 3)
    sessions.append(reader.prefill(prompt(600, 53), max_new_tokens=8))
    apart.append(reader.prefill(prompt(600, 53), max_new_tokens=8))
    del sessions[1], apart[1]
    for _ in range(3):
        together(4, 0, 3, 1, 2)
    assert len(made) == 4
    for session, wanted in zip(sessions, apart, strict=True):
        assert session.token_ids == wanted.token_ids
        for layer in range(3):
            torch.testing.assert_close(session.gather_kv(layer), wanted.gather_kv(layer), rtol=1e-4, atol=1e-4)
    reader.close()


def test_rows_beside_a_row_change_nothing_of_it(made: Graphs) -> None:
    """In bf16, in steps of always as many rows, by one graph for engines that decode alike: to the bit."""
    ours = engine(torch.bfloat16)
    readers = [ours, ours.reading_by("full"), ours.reading_by("star", blocks=3)]
    asked = [prompt(1003), prompt(40), prompt(2500, 53)]
    sessions, again = ([r.prefill(one, max_new_tokens=20) for r, one in zip(readers, asked, strict=True)] for _ in "ab")
    for _ in range(20):
        tokens = [int(session.logits.argmax()) for session in sessions]
        extend_together(sessions, tokens, 16)
        for session, other, token in zip(again, sessions, tokens, strict=True):
            extend_together([session], [token], 16)
            assert torch.equal(session.logits, other.logits)
    assert len(made) == 1
    for each in reversed(readers):
        each.close()


@pytest.mark.parametrize("fused", [False, True])
def test_several_sessions_in_bf16(fused: bool) -> None:
    """By graphs and without, three sessions in one pass are as near to fp32 as steps of each alone are."""
    prompts = [prompt(1003), prompt(40), prompt(2500, 53)]

    def read(dtype: torch.dtype, graphs: bool, together: bool) -> Tensor:
        reader = engine(dtype, strategy="full", blocks=None, fused=fused, graphs=graphs)
        sessions, logits = [reader.prefill(each, max_new_tokens=8) for each in prompts], []
        for token in (7, 9, 11, 13):
            if together:
                extend_together(sessions, [token, token + 1, token + 2])
            else:
                for place, session in enumerate(sessions):
                    session.extend([token + place])
            assert [session.captured for session in sessions] == [graphs] * 3
            logits += [session.logits for session in sessions]
        reader.close()
        return torch.stack(logits)

    exact = read(torch.float32, False, False)

    def off(logits: Tensor) -> float:
        return ((logits - exact).norm() / exact.norm()).item()

    near = off(read(torch.bfloat16, True, False))
    for graphs in (False, True):
        assert off(read(torch.float32, graphs, True)) < 1e-4
        assert off(read(torch.bfloat16, graphs, True)) < 1.5 * near + 0.01


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


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        *((family, False) for family in ("qwen3_5_text", "falcon_h1", "jamba", "nemotron_h", "lfm2", "minimax")),
        *((family, True) for family in ("qwen3_5_text", "falcon_h1")),
    ],
)
def test_recurrent_layers(family: str, fused: bool, made: Graphs) -> None:
    """One graph serves sessions that take turns and go back: in fp32 the logits and states of ordinary passes, after
    several tokens were read at once as well; in bf16 the tokens of steps without graphs."""

    def read(dtype: torch.dtype, **options: Any) -> tuple[list[list[int]], list[Tensor]]:
        model = hybrids.make(family)
        model.set_experts_implementation("batched_mm")  # in fp32 the host waits for the others
        reader = Engine.from_model(
            model.to("cuda", dtype), strategy="full", verify=False, **{"fused": fused, **options}
        )
        sessions = [reader.prefill(each, max_new_tokens=20) for each in (prompt(200), prompt(90, 29))]
        first, after, logits = sessions[0], sessions[0].logits, []
        first.rewind(len(prompt(200)), after)  # where it is, so that it can return
        for turn in range(9):
            if turn == 5:
                first.rewind(len(prompt(200)), after)
                first.extend([5, 6, 7])
            logits += [session.extend([(41 * turn + number) % 97]) for number, session in enumerate(sessions)]
            assert [session.captured for session in sessions] == [options.get("graphs", "backend" not in options)] * 2
        states = [
            part.clone()
            for session in sessions
            for state in session.cache.states.values()
            for part in state.tensors().values()
        ]
        chosen = [answer(session, 8) for session in sessions]
        reader.close()
        return chosen, [torch.stack(logits), *states]

    _, found = read(torch.float32)
    assert len(made) == 1
    _, wanted = read(torch.float32, fused=False, backend="torch")
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    assert read(torch.bfloat16)[0] == read(torch.bfloat16, graphs=False)[0]
    assert len(made) == 2


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
        other, third = (ours.prefill(prompt(length), max_new_tokens=8) for length in (400, 90))
        answer(other, 3)
        assert len(made) == 1
        extend_together([other, third], [3, 4])
        assert len(made) == 2
        assert all(graph() is not None for graph in made)
        ours.close()
        assert all(graph() is None for graph in made)
        assert private_bytes() == held
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="The engine was closed"):
        other.extend([3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 1, 64), (6, 3, 80)])
@pytest.mark.parametrize("sessions", [1, 4])
def test_a_graph_serves_every_cache(
    sessions: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Captured once, the kernels append to and read whatever caches the table names; what lies behind is not read, and
    nothing but the slots is written."""
    from apb.kernels import decode

    torch.manual_seed(0)
    table = torch.zeros(2, sessions, 3, dtype=torch.long, device="cuda")
    slots = torch.zeros(sessions, dtype=torch.long, device="cuda")
    lengths = torch.ones(sessions, dtype=torch.int32, device="cuda")

    def storages(*capacities: int) -> list[list[list[Tensor]]]:
        """By layer and session, keys and values."""
        return [
            [[torch.full((kv_heads, room, head_dim), torch.nan, device="cuda", dtype=dtype) for _ in "kv"] for room in
             capacities] for _ in range(2)
        ]  # fmt: skip

    def place(caches: list[list[list[Tensor]]], held: list[int]) -> None:
        addresses = [[[k.data_ptr(), v.data_ptr(), k.shape[1]] for k, v in layer] for layer in caches]
        table.copy_(torch.tensor(addresses))
        slots.copy_(torch.tensor(held))
        lengths.copy_(slots + 1)

    def step() -> list[Tensor]:
        results: list[Tensor] = []
        for layer in range(2):
            decode.append(k[layer], v[layer], table, layer, slots)
            results += decode.cached_attention(q, table, layer, kv_heads, 0.1, lengths, partial=True)
        return results

    # As a model gives them: head by head, the rows of all sessions together.
    q = torch.randn(heads, sessions, head_dim, device="cuda").to(dtype).transpose(0, 1)
    k, v = (torch.randn(2, kv_heads, sessions, head_dim, device="cuda").to(dtype).transpose(1, 2) for _ in "kv")
    caches = storages(*[5] * sessions)
    place(caches, [0] * sessions)
    step()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    of_each = [(7, 6), (100_003, 99_999), (1000, 0), (64, 63), (20_000, 3)]
    for first in range(len(of_each)):
        chosen = [of_each[(first + number) % len(of_each)] for number in range(sessions)]
        caches = storages(*(capacity for capacity, _ in chosen))
        for layer in caches:
            for pair, (_, held) in zip(layer, chosen, strict=True):
                for x in pair:
                    x[:, :held] = torch.randn(kv_heads, held, head_dim, device="cuda").to(dtype)
        wanted = [[[x.clone() for x in pair] for pair in layer] for layer in caches]
        for number, layer in enumerate(wanted):
            for session, (pair, (_, held)) in enumerate(zip(layer, chosen, strict=True)):
                for x, new in zip(pair, (k, v), strict=True):
                    x[:, held] = new[number, session]
        place(caches, [held for _, held in chosen])
        graph.replay()
        for number, (layer, right) in enumerate(zip(caches, wanted, strict=True)):
            out, lse = results[2 * number : 2 * number + 2]
            for session, (pair, expected, (_, held)) in enumerate(zip(layer, right, chosen, strict=True)):
                for x, y in zip(pair, expected, strict=True):
                    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
                own = Segment(*(x[:, : held + 1].transpose(0, 1).float() for x in expected))
                out_wanted, lse_wanted = reference.attention(q[session : session + 1].float(), [own], 0.1)
                assert ((out[session] - out_wanted[0]).norm() / out_wanted.norm()).item() < 1e-4
                assert (lse[:, session] - lse_wanted[:, 0]).abs().max().item() < 1e-4
