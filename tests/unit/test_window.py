"""Attention within a window, against one masked softmax; and which keys travel for it, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apb
from apb.kernels.window import Run, chunked_attention, window_attention
from apb.planning.halo import pieces, sent_rows
from apb.planning.itinerary import Kind
from apb.planning.plan import Plan

HEADS, KV_HEADS, DIM = 4, 2, 8


def masked(
    q: Tensor, first: int, runs: list[Run], window: int, softcap: float | None, chunked: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition: every key against every row, hidden where it stands behind the row or outside the window."""
    k, v = (torch.cat([getattr(run, name) for run in runs]).repeat_interleave(HEADS // KV_HEADS, 1) for name in "kv")
    keys = torch.cat([torch.arange(run.first, run.stop) for run in runs])
    rows = torch.arange(first, first + len(q))[:, None]
    scores = torch.einsum("rhd,khd->hrk", q.double(), k.double()) * DIM**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    near = keys // window == rows // window if chunked else keys > rows - window
    scores = scores.masked_fill(~((keys <= rows) & near), -torch.inf)
    out = torch.einsum("hrk,khd->rhd", scores.softmax(-1).nan_to_num(0.0), v.double())
    return out, scores.logsumexp(-1)


@given(data=st.data())
def test_window_against_the_definition(data: st.DataObject) -> None:
    """Any rows, any window, sliding or not, keys in one run from anywhere or in several, own keys there or not."""
    window = data.draw(st.integers(1, 12), "window")
    first, rows = data.draw(st.integers(0, 30), "first"), data.draw(st.integers(1, 40), "rows")
    cuts = sorted(data.draw(st.lists(st.integers(0, first), max_size=5), "cuts"))
    bounds = [*zip(cuts[::2], cuts[1::2], strict=False)]
    if data.draw(st.booleans(), "own"):
        bounds.append((data.draw(st.integers(bounds[-1][1] if bounds else 0, first), "since"), first + rows))
    generator = torch.Generator().manual_seed(first + rows)

    def draw(count: int, heads: int) -> Tensor:
        return 2 * torch.randn(count, heads, DIM, generator=generator)

    runs = [Run(draw(b - a, KV_HEADS), draw(b - a, KV_HEADS), a) for a, b in bounds]
    softcap = data.draw(st.sampled_from([None, 3.0]), "softcap")
    q = draw(rows, HEADS)
    chunked = data.draw(st.booleans(), "chunked")
    kernel = chunked_attention if chunked else window_attention
    out, lse = kernel(lambda q, segments: apb.attention(q, segments, softcap=softcap), q, first, runs, window)
    expected, expected_lse = masked(q, first, runs or [Run(q[:0, :2], q[:0, :2], 0)], window, softcap, chunked)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_whole_chunks_are_computed_side_by_side() -> None:
    """A long block takes the same few calls whatever its length: chunks become heads."""
    calls = []

    def attend(q: Tensor, segments: list[apb.Segment]) -> tuple[Tensor, Tensor]:
        calls.append(q.shape[1])
        return apb.attention(q, segments)

    q, k = torch.randn(800, HEADS, DIM), torch.randn(807, KV_HEADS, DIM)
    out, lse = window_attention(attend, q, 7, [Run(k, k, 0)], 8)
    assert calls == [100 * HEADS] * 2
    expected, expected_lse = masked(q, 7, [Run(k, k, 0)], 8, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [0, 1, 5, 6, 7, 8, 20])
def test_a_run_may_begin_within_the_window(before: int) -> None:
    """Fewer keys than the window lie before the first row, as many, or more: three chunks of 8 rows all the same."""
    q, k = torch.randn(24, HEADS, DIM), torch.randn(before + 24, KV_HEADS, DIM)
    run = Run(k, k, 20 - before)
    out, lse = window_attention(apb.attention, q, 20, [run], 8)
    expected, expected_lse = masked(q, 20, [run], 8, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_halos_by_hand() -> None:
    """Blocks of 10 at 0, 10, 20 and 30, dealt out in snake order to ranks 0, 1, 1, 0; a window of 4, then of 15."""
    plan = Plan.build(0, 40, 2, blocks=4, ranks=2, anchor_length=6, passing_length=1)
    blocks = [
        (piece.sender, piece.receiver, piece.start, piece.stop)
        for piece in pieces(plan, 4)
        if piece.span.kind is Kind.BLOCK
    ]
    assert blocks == [(1, 0, 27, 30), (0, 1, 7, 10), (1, 1, 17, 20)]
    # The anchor's rows 0..2 are rank 0's and 3..5 rank 1's.
    anchor = [piece for piece in pieces(plan, 4) if piece.span.kind is Kind.ANCHOR]
    assert [(piece.sender, piece.receiver, piece.start, piece.stop) for piece in anchor] == [(0, 1, 0, 3)]
    assert sent_rows(plan, 4) == [[0, 3 + 3], [3, 0]]
    wide = [(piece.sender, piece.receiver, piece.start, piece.stop) for piece in pieces(plan, 15)]
    assert (1, 0, 16, 20) in wide and (1, 0, 20, 30) in wide and (0, 1, 6, 10) in wide


@given(st.data())
def test_halos_hold_what_the_window_needs(data: st.DataObject) -> None:
    """Any plan: the pieces of a span follow each other up to its start, and begin where the window does."""
    strategy = data.draw(st.sampled_from(["apb", "star", "ring", "ulysses", "full"]))
    ranks, window = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    plan = Plan.build(
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(8, 60)),
        2,
        blocks=data.draw(st.integers(2, 8)),
        ranks=ranks,
        strategy=strategy,
    )
    found = pieces(plan, window)
    for rank in range(ranks):
        for span in plan.spans(rank):
            if span.kind is Kind.QUERY or not len(span):
                continue
            mine = [piece for piece in found if (piece.receiver, piece.span) == (rank, span)]
            covered = [position for piece in mine for position in range(piece.start, piece.stop)]
            assert covered == list(range(max(span.start - window + 1, 0), span.start))


@pytest.mark.parametrize("rows", [1, 5, 300])
def test_capped_logits_in_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """c * tanh(x / c) before the softmax, computed in as many chunks of rows as memory asks for."""
    monkeypatch.setattr("apb.kernels.reference.MOST_SCORES", 1 << 12)
    q, k = 3 * torch.randn(rows, HEADS, DIM), torch.randn(300, KV_HEADS, DIM)
    out, lse = apb.attention(q, [apb.Segment(k, k, causal=True)], softcap=2.0)
    expected, expected_lse = masked(q, 300 - rows, [Run(k, k, 0)], 10**6, 2.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    with pytest.raises(apb.InputError, match="cap"):
        apb.attention(q, [], softcap=2.0, backend="torch")
