"""Attention over chosen keys by kernels, interpreted: beside a dense masked softmax over what torch chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from apb.decoding.cluster_index import ClusterIndex
from apb.decoding.page_index import PageIndex
from apb.decoding.selecting import KeyIndex
from apb.kernels import chosen
from apb.kernels.chosen import rule

SCALE = 0.3


@dataclass
class Layer:
    """Keys and values of one layer in storage with room behind them, and an index of the first keys."""

    k: Tensor
    v: Tensor
    index: KeyIndex
    length: int
    budget: int

    @staticmethod
    def of(index: KeyIndex, keys: int, length: int, capacity: int, budget: int, heads: int, head_dim: int) -> Layer:
        """Random ones; not-a-number behind ``length``. The index is given the first ``keys``."""
        k, v = torch.full((2, heads, capacity, head_dim), math.nan)
        k[:, :length], v[:, :length] = torch.randn(2, heads, length, head_dim)
        if keys:
            index.extend(k[:, :keys])
        return Layer(k, v, index, length, budget)

    def places(self, away: int) -> tuple[tuple[int, int, int], tuple[Tensor, Tensor] | None, list[Tensor]]:
        """The layer's place in the table of storages, what of it is far, and the tensors that hold it, if the first
        keys are elsewhere than the others, in a storage with room behind them. Not-a-number where nothing is."""
        if not away:
            return (self.k.data_ptr(), self.v.data_ptr(), self.k.shape[1]), None, [self.k, self.v]
        far = [torch.cat([x[:, :away], torch.full_like(x[:, :3], math.nan)], 1) for x in (self.k, self.v)]
        near = [x[:, away:].clone() for x in (self.k, self.v)]
        k, v = (x.data_ptr() - away * x[0, 0].nbytes for x in near)
        far_k, far_v = (x[:, :away].transpose(0, 1) for x in far)
        return (k, v, near[0].shape[1]), (far_k, far_v), [*far, *near]

    def expected(self, q: Tensor, together: bool) -> tuple[Tensor, Tensor, Tensor]:
        """out (heads, head_dim), lse (heads,) in fp64, and the keys seen, bool (kv_heads, length)."""
        seen = torch.ones(len(self.k), self.length, dtype=torch.bool)
        rows = q[0].unflatten(0, (len(self.k), -1))
        if self.index.covered:
            scores, sizes = self.index.scores(rows.float() * SCALE)
            if together:
                picked = rule.within(scores.flatten()[None], sizes.flatten()[None], self.budget).view_as(scores)
            else:
                picked = rule.within(scores, sizes, self.budget)
            seen[:, : self.index.covered] = self.index.keys_of(picked)
        k, v = self.k[:, : self.length].double(), self.v[:, : self.length].double()
        logits = (rows.double() @ k.transpose(1, 2) * SCALE).masked_fill(~seen.unsqueeze(1), -math.inf)
        return (logits.softmax(-1) @ v).flatten(0, 1), logits.logsumexp(-1).flatten(), seen


def pages_or_clusters(page_size: int | None) -> KeyIndex:
    return ClusterIndex(6) if page_size is None else PageIndex(page_size)


@pytest.mark.triton
@pytest.mark.parametrize("away", [(0,) * 5, (136, 3, 337, 126, 97)], ids=["near", "far"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "page_size", "together"),
    [
        *((4, 2, 16, torch.float32, *way) for way in ((5, False), (16, True), (None, False), (None, True))),
        *((8, 1, 64, torch.float16, *way) for way in ((16, True), (None, False))),
        *((3, 3, 20, torch.float32, *way) for way in ((5, False), (None, True))),
    ],
)
def test_attention_over_what_torch_chooses(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_size: int | None,
    together: bool,
    away: tuple[int, ...],
) -> None:
    """In layers of other sizes, budgets and parts that no index covers, by one table; one has an index of no key, one
    dropped keys after it was made. Their first keys may be elsewhere, fewer or more than an index covers. What is
    chosen is counted."""
    monkeypatch.setattr(chosen, "_processors", lambda device: 3)
    monkeypatch.setattr(chosen, "CHUNKS", 4)
    torch.manual_seed(0)
    q = torch.randn(heads, 1, head_dim).to(dtype).transpose(0, 1)
    share = kv_heads if together else 1
    sizes = [(160, 200, 209, 40), (0, 7, 7, 0), (400, 401, 500, 120), (90, 190, 190, 0), (160, 161, 161, 10**6)]
    layers = [Layer.of(pages_or_clusters(page_size), *size[:3], size[3] * share, kv_heads, head_dim) for size in sizes]
    layers[2].index.forget(300)
    for layer in layers:
        layer.k, layer.v = layer.k.to(dtype), layer.v.to(dtype)
        for name, part in layer.index.tensors().items():
            if part.is_floating_point():
                setattr(layer.index, name, getattr(layer.index, name).to(dtype))
    places, fars, kept = zip(*(x.places(first) for x, first in zip(layers, away, strict=True)), strict=True)
    storages = torch.tensor(places)
    stored = [x.index.stored() for x in layers]
    room = max(chosen.scratch_size(heads, x) for x in stored)
    scratch = torch.full((room,), -7, dtype=torch.int32)
    parts = zip(stored, layers, fars, strict=True)
    table = torch.tensor([chosen.row(x, layer.budget, scratch, far) for x, layer, far in parts])
    counts = torch.full((len(layers), kv_heads, chosen.CHUNKS), -1, dtype=torch.int32)
    for number, layer in enumerate(layers):
        length = torch.tensor([layer.length], dtype=torch.int32)
        out, lse = chosen.attention(
            q, storages, table, counts[number], number, kv_heads, SCALE, length,
            page_size=page_size, together=together, far=any(away), partial=number == 2,
        )  # fmt: skip
        wanted, wanted_lse, seen = layer.expected(q, together)
        tolerance = 2e-3 if dtype == torch.float16 else 1e-5
        assert out.dtype == (torch.float32 if number == 2 else dtype)
        torch.testing.assert_close(out[0].double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[:, 0].double(), wanted_lse, rtol=tolerance, atol=tolerance)
        taken = counts[number].sum(1) * (page_size or 1)
        assert taken.tolist() == seen[:, : layer.index.covered].sum(1).tolist()
    assert len(kept) == len(layers)  # the table knows them by address alone


def test_the_best_that_fit() -> None:
    """By brute force: of all thresholds the lowest that the budget has room for, or the highest if it has for none."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        scores = -torch.randint(1, 9, (2, 12), generator=generator).float()
        sizes = torch.randint(0, 5, (2, 12), generator=generator)
        budget = int(torch.randint(0, 30, (), generator=generator))
        found = rule.within(scores, sizes, budget)
        for score, size, picked in zip(scores, sizes, found, strict=True):
            fitting = [t for t in score.unique().tolist() if size[score >= t].sum() <= budget]
            assert torch.equal(picked, score >= min(fitting, default=score.max().item()))


def test_places_are_in_the_order_of_scores() -> None:
    """Down to 18 binary digits; what promises all, nothing or not a number stands at the ends."""
    scores = -torch.logspace(-1.7, 2.9, 5000)
    found = rule.places(scores)
    assert (found.diff() > 0).all() and found[0] > 0 and found[-1] < rule.LAST
    ends = rule.places(torch.tensor([0.0, 1e-6, -0.01, -2000.0, -math.inf, math.nan]))
    assert ends.tolist() == [0, 0, 0, *[rule.LAST] * 3]
