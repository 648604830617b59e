"""Decode methods that choose keys, by kernels and CUDA graphs on an NVIDIA GPU, beside what torch computes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apb import Engine, Prompt, Segment
from apb.decoding import EXACT, Decoding, Indexed, Pages, Retrieval, Squeezed
from apb.decoding.cluster_index import ClusterIndex
from apb.decoding.held import in_place
from apb.decoding.page_index import PageIndex
from apb.hf.cache import ShardCache
from apb.hf.pinned import HostMemory
from apb.kernels import chosen, kmeans, reference
from models import tiny_model, without_eos

pytestmark = pytest.mark.gpu

SELECTORS = [Pages(0.2), Squeezed(0.2)]
METHODS = [*SELECTORS, *(Retrieval(0.2, each.name) for each in SELECTORS)]
NAMES = [" ".join([each.name, *([each.selector] if isinstance(each, Retrieval) else [])]) for each in METHODS]
# Scores this near may change places: several times what the order of sums does to those of the model below.
CLOSE = 3e-4


def prompt(document: int, seed: int = 37) -> Prompt:
    return Prompt.from_tokens([1, 2], [(seed * i * i + 11 * i) % 97 for i in range(document)], [5, 6, 7])


def engine(decoding: Decoding, **options: Any) -> Engine:
    model = without_eos(tiny_model("llama", heads=8, kv_heads=2, head_dim=64)).to("cuda")
    return Engine.from_model(model, strategy="full", decoding=decoding, **options)


def steps(session: Any, tokens: list[int]) -> Tensor:
    return torch.stack([session.extend([token]) for token in tokens])


def near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return (found - wanted).abs().max().item() < tolerance


@pytest.fixture
def gaps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For every choice that torch makes: how far the scores of the last unit that its budget has room for, the next
    one, and the one after that are apart, the nearer two of them. While each exceeds what rounding does to scores and
    to their places, the same units are chosen: one more would not fit."""
    found: list[float] = []
    within = chosen.within

    def noted(scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
        order, index = scores.sort(1, descending=True)
        room = (sizes.gather(1, index).cumsum(1) <= budget).sum(1, keepdim=True).clamp(min=1)
        behind = torch.nn.functional.pad(-order.diff(dim=1), (0, 2), value=math.inf)
        found.append(behind.gather(1, torch.cat([room - 1, room], 1)).min().item())
        return within(scores, sizes, budget)

    monkeypatch.setattr(chosen, "within", noted)
    return found


def compared(session: Any, wanted: Any, passes: list[list[int]], gaps: list[float]) -> int:
    """Read tokens by both, one pass after the other, and compare the logits; how many were compared.

    If a choice was close, what it gave is not compared: a unit more or less moves logits by more than rounding does.
    Since it stays in the keys of upper layers, both return to where they began.
    """
    start, count = len(session.token_ids), 0
    for tokens in passes:
        gaps.clear()
        found, expected = session.extend(tokens), wanted.extend(tokens)
        if min(gaps, default=math.inf) > CLOSE:
            assert near(found, expected, 1e-3)
            count += 1
        else:
            for each in (session, wanted):
                each.rewind(start, each.logits)
    return count


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_graphs_attend_to_what_torch_does(method: Indexed, gaps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, over one index: on several lengths by one engine, after a return to fewer tokens, after the cache has
    grown, with several tokens read at once in between. The shares are those of ordinary passes.

    Kernels and torch sum in another order, so a unit at the budget's edge may be in for one and out for the other if
    its neighbour's score is nearly the same. Passes with such a choice are not compared, but most of them must be."""
    monkeypatch.setattr(ShardCache, "growth", 3)
    ours, plain = (engine(method, allow_extrapolation=True, **options) for options in ({}, {"backend": "torch"}))
    several, single = [[(7 * i) % 97 for i in range(9)]], [[(7 * i) % 97] for i in range(12)]
    lengths, count = (3003, 40, 1200, 9000), 0
    for length in lengths:
        asked = prompt(length)
        session, wanted = ours.prefill(asked, max_new_tokens=8), plain.prefill(asked)
        first = session.logits
        for each in (session, wanted):
            method.build(each.cache)
        ours_index, plain_index = (each.cache.indexes[method.index_key] for each in (session, wanted))
        for layer, index in ours_index.items():  # clusters of keys that torch made in another order may differ
            if parts := index.tensors():
                plain_index[layer].restore(parts)
        count += compared(session, wanted, single, gaps)
        assert session.captured and not wanted.captured
        for each in (session, wanted):
            each.rewind(len(asked) - 1, first)
        count += compared(session, wanted, several + single, gaps)
        assert session.captured
        assert abs(session.share - wanted.share) < 1e-3
        assert (session.share < 0.5) == (length > 64)
    assert count > 0.8 * len(single + several + single) * len(lengths)
    ours.close()


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_questions_of_a_document(method: Decoding) -> None:
    """Two questions after another document's, by the graphs of the first: the tokens of ordinary passes."""
    ours, plain = engine(method), engine(method, graphs=False)
    texts = [list(prompt(length).document) for length in (2500, 900)]
    questions = [[5, 6, 7], [(3 * i) % 97 for i in range(150)], [9, 8]]
    for text in texts:
        document, wanted = ours.read(tokens=text), plain.read(tokens=text)
        for question in questions:
            answer, expected = (each.ask(question, max_new_tokens=16) for each in (document, wanted))
            assert answer.token_ids == expected.token_ids
            assert answer.decode["share"] == pytest.approx(expected.decode["share"], abs=1e-3)
            assert answer.decode["share"] < 0.6
    ours.close()


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_everything_is_exact(method: Indexed) -> None:
    """With a share of 1, by graphs."""
    ours, exact = engine(replace(method, share=1.0)), engine(EXACT)
    tokens = [(7 * i) % 97 for i in range(10)]
    for length in (3003, 700):
        sessions = [each.prefill(prompt(length), max_new_tokens=10) for each in (ours, exact)]
        found, wanted = (steps(session, tokens) for session in sessions)
        assert near(found, wanted, 1e-3)
        assert sessions[0].captured and sessions[0].share == 1.0


@pytest.mark.parametrize("here", SELECTORS, ids=lambda method: method.name)
def test_host_memory_is_read_in_place(here: Indexed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the graphs of several sessions in turns: the logits that the selector gives over keys on the device. After a
    return to fewer tokens than are away, with several tokens read at once in between, when the cache has grown, and of
    a document that comes from a disk."""
    monkeypatch.setattr(ShardCache, "growth", 3)
    ours, near_ones = (engine(each, allow_extrapolation=True) for each in (Retrieval(0.2, here.name), here))
    asked, tokens = [prompt(length) for length in (3003, 40, 9000)], [(7 * i) % 97 for i in range(12)]
    pairs = [[each.prefill(one, max_new_tokens=8) for each in (ours, near_ones)] for one in asked]
    firsts = [session.logits for session, _ in pairs]

    def compare() -> None:
        for token in tokens:
            for session, wanted in pairs:
                assert near(session.extend([token]), wanted.extend([token]), 1e-3)
                assert session.captured and wanted.captured
                assert session.share == pytest.approx(wanted.share, abs=1e-3)

    compare()
    for (session, wanted), one, first in zip(pairs, asked, firsts, strict=True):
        far, back = session.cache.far(0), min(len(one) - 1, 500)
        assert (far is None) == (len(one) < 64)
        if far is not None:  # torch's is_pinned asks where the storage begins, which is before what is pinned
            read = in_place(far, session.logits.device)
            assert read is not None and all(x.is_cuda for x in read) and not any(x.is_cuda for x in far)
            assert [(len(x), x.data_ptr()) for x in read] == [(len(one) - 64, x.data_ptr()) for x in far]
        for each in (session, wanted):
            each.rewind(len(one) - back, first)
        assert near(session.extend(tokens), wanted.extend(tokens), 1e-3)
    compare()
    text, told = list(prompt(2500).document), []
    for each in (ours, near_ones):
        each.read(tokens=text).save(tmp_path / each.reading.decoding.name)
        document = each.load(tmp_path / each.reading.decoding.name)
        told.append([document.ask(question, max_new_tokens=16).token_ids for question in ([5, 6, 7], [9] * 150, [8])])
        assert document.state.cache.offloaded == (each is ours)
    assert told[0] == told[1]
    ours.close()
    near_ones.close()


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 1, 64), (6, 3, 80)])
@pytest.mark.parametrize(("page_size", "together"), [(16, False), (None, True)])
def test_a_graph_serves_every_index(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int | None, together: bool, far: bool
) -> None:
    """Captured once over no key, replayed over indexes of many sizes: within 1e-3 of fp32 attention over the keys that
    the kernels say they chose; these are as many as torch chooses, but for scores that its other sums bring past the
    threshold. A replay repeats itself to the bit. Four of five keys may be in host memory."""
    torch.manual_seed(0)
    scale = head_dim**-0.5
    q = (2 * torch.randn(1, heads, head_dim, device="cuda")).to(dtype)
    storages = torch.zeros(1, 3, dtype=torch.long, device="cuda")
    table = torch.zeros(1, chosen.COLUMNS, dtype=torch.long, device="cuda")
    counts = torch.zeros(kv_heads, chosen.CHUNKS, dtype=torch.int32, device="cuda")
    length = torch.zeros(1, dtype=torch.int32, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        return chosen.attention(
            q, storages, table, counts, 0, kv_heads, scale, length, page_size=page_size, together=together, far=far,
            partial=True,
        )  # fmt: skip

    scratch = torch.zeros(0, dtype=torch.int32, device="cuda")
    table.copy_(torch.tensor([chosen.row(None, 0, scratch)]))
    step()  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for held, indexed, room in ((300, 200, 300), (150_000, 149_900, 150_003), (5000, 4000, 6000), (70, 0, 70)):
        k, v = (torch.full((kv_heads, room, head_dim), torch.nan, device="cuda", dtype=dtype) for _ in "kv")
        for x in (k, v):
            x[:, :held] = torch.randn(kv_heads, held, head_dim, device="cuda").to(dtype)
        index = PageIndex(page_size) if page_size else ClusterIndex(20)
        index.extend(k[:, :indexed])
        stored = index.stored()
        budget = indexed // 10 * (kv_heads if together else 1)
        scratch = torch.full((chosen.scratch_size(heads, stored),), -1, dtype=torch.int32, device="cuda")
        storages.copy_(torch.tensor([[k.data_ptr(), v.data_ptr(), room]]))
        away = None
        if far:
            memory = HostMemory(2 * kv_heads * (first := held * 4 // 5) * head_dim, dtype, [k.device])
            pinned = memory.numbers.view(2, kv_heads, first, head_dim)
            kept = k.clone(), v.clone()
            for into, x in zip(pinned, (k, v), strict=True):
                into.copy_(x[:, :first])
                x[:, :first] = torch.nan
            away = pinned[0].transpose(0, 1), pinned[1].transpose(0, 1)
        table.copy_(torch.tensor([chosen.row(stored, budget, scratch, away)]))
        length.fill_(held)
        graph.replay()
        taken = counts.sum(1) * (page_size or 1)
        before = out.clone(), lse.clone()
        graph.replay()
        assert torch.equal(out, before[0]) and torch.equal(lse, before[1])
        if far:
            k, v = kept
        if stored is None:
            seen = torch.ones(kv_heads, held, dtype=torch.bool, device="cuda")
        else:
            seen = listed(stored, scratch, counts, heads, held, page_size)
            assert seen[:, : stored.covered].sum(1).tolist() == taken.tolist()
            scores, sizes = index.scores(q[0].unflatten(0, (kv_heads, -1)).float() * scale)
            problems = (1, -1) if together else (kv_heads, -1)
            wanted = chosen.within(scores.reshape(problems), sizes.reshape(problems), budget).view_as(scores)
            apart = index.keys_of(wanted) != seen[:, : stored.covered]
            assert apart.float().mean().item() < 2e-3
            assert indexed < 1000 or taken.sum().item() <= budget * (1 if together else kv_heads)
        for head in range(kv_heads):
            group = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
            pair = (x[head, :held][seen[head]].float().unsqueeze(1) for x in (k, v))
            expected, expected_lse = reference.attention(q[:, group].float(), [Segment(*pair)], scale)
            assert ((out[:, group] - expected).norm() / expected.norm()).item() < 1e-3
            assert (lse[group] - expected_lse).abs().max().item() < 1e-3


def listed(
    stored: chosen.Index, scratch: Tensor, counts: Tensor, heads: int, held: int, page_size: int | None
) -> Tensor:
    """The keys, bool (kv_heads, held), in the kernels' lists, and those that the index does not cover."""
    kv_heads, units, _ = stored.first.shape
    room = -(-(units if page_size else stored.covered) // chosen.CHUNKS)
    lists = scratch[(heads + kv_heads) * units :].view(kv_heads, chosen.CHUNKS, room)
    inside = torch.arange(room, device="cuda") < counts.unsqueeze(2)
    seen = torch.zeros(kv_heads, held, dtype=torch.bool, device="cuda")
    seen[:, stored.covered :] = True
    for head in range(kv_heads):
        entries = lists[head][inside[head]].long()
        width = page_size or 1
        seen[head, (entries.unsqueeze(1) * width + torch.arange(width, device="cuda")).flatten()] = True
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_clusters_repeat_themselves(dtype: torch.dtype) -> None:
    """The same keys give the same clusters: no sum of k-means depends on the order in which programs end."""
    torch.manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(2, 12800, 64, device="cuda"), dim=2).to(dtype)
    (first, count), (second, _) = (kmeans.two_levels(points, 10, 20) for _ in range(2))
    assert count == 640 and torch.equal(first, second)
    assert first.unique().numel() > 600
