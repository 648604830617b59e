"""Decode methods that attend to a part of the keys: pages by their bounds, clusters by their means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import apb
from apb.decoding import Decoding, Pages, Squeezed
from apb.decoding.cluster_index import ClusterIndex
from apb.decoding.page_index import PageIndex
from apb.kernels.attention import Segment, attention
from apb.layers.base import AttentionInput
from apb.layers.shards import NewRows
from chosen import attended, chosen
from families import PECULIAR, make
from models import tiny_model, without_eos

PREFIX, QUERY, ANSWER = [1, 2], [5, 6, 7], [12, 70, 33, 33, 1]
DOCUMENT = [(37 * i * i + 11 * i) % 97 for i in range(301)]
PROMPT = apb.Prompt.from_tokens(PREFIX, DOCUMENT, QUERY)
METHODS = [Pages(page_size=5), Squeezed(cluster_size=4)]


class Held:
    """A shard of one layer, of given keys, the first of them in host memory."""

    indices = (0,)
    windows: ClassVar[dict[int, int]] = {}

    def __init__(self, keys: int, kv_heads: int = 2, head_dim: int = 8, away: int = 0) -> None:
        self.away = away
        generator = torch.Generator().manual_seed(3)
        self.k, self.v = torch.randn(2, keys, kv_heads, head_dim, generator=generator)
        self.v[..., 6:] = 0
        self.q = torch.randn(1, 3 * kv_heads, head_dim, generator=generator)
        self.indexes: dict[Any, Any] = {}

    def near(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.k[self.away :], self.v[self.away :]

    def far(self, layer: int) -> tuple[Tensor, Tensor] | None:
        # Values narrower than keys: attention gets them as wide, the cache has them as they are.
        return (self.k[: self.away], self.v[: self.away, :, :6]) if self.away else None

    def layer(self) -> AttentionInput:
        return AttentionInput(0, self.q, *self.near(0), 0.5)


def engine_of(decoding: Decoding | str, model: Any = None, **options: Any) -> apb.Engine:
    model = model or without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16))
    return apb.Engine.from_model(model, strategy="full", decoding=decoding, **options)


def decoded(engine: apb.Engine) -> Tensor:
    session = engine.prefill(PROMPT)
    return torch.stack([session.extend([token]) for token in ANSWER])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("family", [None, "gemma2", "deepseek_v3"])
def test_the_whole_budget_is_exact(method: Any, family: str | None) -> None:
    """Also under soft-capped logits, windows and latents; the answer says that all was read."""
    model = None if family is None else make(*PECULIAR[family])
    everything = engine_of(replace(method, share=1.0), model)
    torch.testing.assert_close(decoded(everything), decoded(engine_of("exact", model)), rtol=1e-4, atol=1e-4)
    assert everything.generate(PROMPT, max_new_tokens=4).decode == {"method": method.name, "exact": True, "share": 1.0}


@pytest.mark.parametrize("seed", range(20))
def test_no_key_exceeds_its_pages_bound(seed: int) -> None:
    """Of whole numbers, whose products are exact; and a page of equal keys has its bound reached."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-9, 10, (2, 53, 6), generator=generator).float()
    keys[:, 8:12] = keys[:, 8:9]
    q = torch.randint(-9, 10, (2, 3, 6), generator=generator).float()
    index = PageIndex(4)
    index.extend(keys)
    assert index.covered == 52
    true = (q @ keys[:, :52].transpose(1, 2)).unflatten(2, (13, 4)).amax(3)
    bounds = index.bounds(q)
    assert (bounds >= true).all()
    assert (bounds > true).any()
    assert torch.equal(bounds[..., 2], true[..., 2])


@pytest.mark.parametrize("method", [Pages(0.5, page_size=10), Squeezed(0.6, cluster_size=9)], ids=lambda m: m.name)
@pytest.mark.parametrize("away", [0, 47, 130, 136])
def test_the_keys_of_a_numpy_reference_are_attended_to(method: Any, away: int) -> None:
    """Bounds of pages; k-means, scores of clusters and their threshold. The keys that it chooses, and the last ones,
    wherever they are: fewer of them in host memory than the index covers, as many, more."""
    held = Held(200, away=away)
    reader = method.prepare(held)
    out, lse = reader.attend(held.layer(), NewRows(200, [range(200)]))
    seen = chosen(method, held.q[0], held.k, 0.5)
    np.testing.assert_allclose(out[0], attended(held.q[0], held.k, held.v, 0.5, seen), atol=1e-5)
    assert lse.shape == (6, 1)
    assert method.share - 0.1 < reader.share == seen.mean() <= method.share
    held.q = -2 * held.q  # a token after it has the same budget
    out, _ = reader.attend(held.layer(), NewRows(200, [range(200)]))
    seen = chosen(method, held.q[0], held.k, 0.5)
    np.testing.assert_allclose(out[0], attended(held.q[0], held.k, held.v, 0.5, seen), atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_rows_of_one_pass_are_those_of_one_a_pass(method: Any) -> None:
    """Scores of several tokens are those of the steps that would choose them; a score changes nothing."""
    method = replace(method, share=0.3)
    steps = decoded(engine_of(method)).log_softmax(-1)
    session = engine_of(method).prefill(PROMPT)
    for _ in range(2):
        scores, _ = session.score(ANSWER)
        expected = [steps[row, token] for row, token in enumerate(ANSWER[1:])]
        torch.testing.assert_close(scores[1:], torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert 0.25 < session.share < 0.35


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_share_changes_the_answer_and_is_told(method: Any) -> None:
    """At 30 % the logits are others, and the answer says what it is."""
    engine = engine_of(replace(method, share=0.3))
    assert not torch.allclose(decoded(engine), decoded(engine_of("exact")), atol=1e-3)
    answer = engine.generate(PROMPT, max_new_tokens=4)
    told = answer.decode
    assert (told["method"], told["exact"], answer.exact) == (method.name, False, False)
    assert engine_of(replace(method, share=1.0)).generate(PROMPT, max_new_tokens=4).exact
    assert 0.25 < told["share"] < 0.35


def test_pages_stay_with_a_document() -> None:
    """Bounds are built once, and are those of keys that the document still holds, whatever was asked before, also
    after it has grown."""
    method = Pages(share=0.3, page_size=5)
    engine = engine_of(method)
    document = engine.read(tokens=DOCUMENT[:250], prefix=PREFIX)
    queries = [[(7 * i + n) % 97 for i in range(length)] for n, length in enumerate((3, 150, 4))]

    def check(text: list[int]) -> None:
        for query in queries:
            fresh = engine.read(tokens=text, prefix=PREFIX)
            assert document.ask(query, max_new_tokens=6).token_ids == fresh.ask(query, max_new_tokens=6).token_ids
            (index,) = document.state.cache.indexes.values()
            held = document.state.cache.shard(0)[0].transpose(0, 1)
            pages = held[:, : index[0].covered].unflatten(1, (-1, 5))
            assert torch.equal(index[0].least, pages.amin(2)) and torch.equal(index[0].largest, pages.amax(2))

    check(DOCUMENT[:250])
    before = document.state.cache.indexes[(method.name, 5)]
    engine.read(tokens=DOCUMENT, prefix=PREFIX, after=document)
    check(DOCUMENT)
    assert document.state.cache.indexes[(method.name, 5)] is before


def test_indexes_go_with_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with a document that leaves the device: clusters are not made twice; each follows its own document."""
    engine = engine_of(Squeezed(share=0.3, cluster_size=4))
    document = engine.read(tokens=DOCUMENT, prefix=PREFIX)
    wanted = document.ask([3, 4], max_new_tokens=6).token_ids
    copy = document.copy()
    document.ask([9] * 90, keep=True, max_new_tokens=3)
    monkeypatch.setattr(ClusterIndex, "extend", lambda *_: pytest.fail("clusters were made again"))
    assert [copy.state.cache.indexes[("squeezed", 4)][layer].covered for layer in range(3)] == [239] * 3
    copy.come_back(copy.leave(None))
    monkeypatch.setattr(ClusterIndex, "extend", lambda *_: None)  # of the question
    assert copy.ask([3, 4], max_new_tokens=6).token_ids == wanted


def test_clusters_follow_the_cache() -> None:
    """Keys that are dropped leave their clusters, keys that come have others; a few wait until they make a cluster."""
    keys = Held(100).k.transpose(0, 1)
    index = ClusterIndex(10)
    index.extend(keys[:, :60])
    assert index.covered == 60 and index.sizes.shape == (2, 6)
    index.forget(45)
    index.extend(keys[:, 45:54])
    assert index.covered == 45 and index.sizes.sum(1).tolist() == [45, 45]
    index.extend(keys[:, 45:])
    assert index.covered == 100 and index.sizes.shape == (2, 11)
    assert index.sizes[:, 6:].sum(1).tolist() == [55, 55]
    assert index.labels[:, :45].max() < 6 <= index.labels[:, 45:].min()
    scores, _ = index.scores(torch.ones(2, 1, 8))
    everything = scores > -math.inf
    assert index.keys_of(everything).all() and not index.keys_of(~everything).any()


def test_clusters_of_many_keys() -> None:
    """Made in two levels, hardly a cluster has keys of two groups that point elsewhere, wherever keys stand: at most
    where runs end, one key of a group may stand alone. A few of the last keys stay uncovered."""
    generator = torch.Generator().manual_seed(5)
    groups = torch.randint(16, (2, 2053), generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(2, 16, 24, generator=generator), dim=2)
    keys = directions.gather(1, groups.unsqueeze(2).expand(-1, -1, 24))
    keys = keys + 0.05 * torch.randn(keys.shape, generator=generator)
    keys = keys * (1 + torch.rand(2, 2053, 1, generator=generator))
    index = ClusterIndex(4)
    index.extend(keys)
    assert index.covered == 2048 and index.means.shape == (2, 512, 24)
    for head in range(2):
        pairs = torch.stack([index.labels[head].long(), groups[head, :2048]], 1).unique(dim=0)
        used = len(pairs[:, 0].unique())
        assert 400 < used <= len(pairs) <= used + 4
        members = torch.nn.functional.one_hot(index.labels[head].long(), 512).float().T
        held = members.sum(1)
        assert torch.equal(index.sizes[head].float(), held)
        torch.testing.assert_close(index.means[head], members @ keys[head, :2048] / held.clamp(min=1).unsqueeze(1))


@pytest.mark.parametrize("keys", [0, 1, 30, 66])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_short_shards_are_read_in_full(method: Any, keys: int) -> None:
    """A rank may hold few keys, or none."""
    held = Held(keys)
    reader = method.prepare(held)
    layer = held.layer()
    out, lse = reader.attend(layer, NewRows(keys + 1, [range(keys)] if keys else []))
    expected = attention(layer.q, [Segment(layer.k, layer.v)], layer.scale)
    torch.testing.assert_close((out, lse), expected)
    assert reader.share == 1.0


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_is_checked(share: float) -> None:
    """By either method, by its object and its name."""
    for make_it in (lambda: Pages(share=share), lambda: apb.decoding.make_decoding("squeezed", {"share": share})):
        with pytest.raises(apb.InputError, match="share of keys must be above 0 and at most 1, not"):
            make_it()
