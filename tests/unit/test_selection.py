"""Which pairs a block passes on: the choice by sorted lists, and Triton's kernels the same as torch, ties and all."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.kernels import selection
from apb.kernels.selection import attention_received, choose, pack, pool

# Whether Triton's kernels compute, interpreted without a GPU.
ENGINES = [False] + [True] * (find_spec("triton") is not None)


def pooled_by_hand(scores: list[float]) -> list[float]:
    """The largest of each token's own score and those of two neighbours on each side, within the block."""
    return [max(scores[max(0, token - 2) : token + 3]) for token in range(len(scores))]


@pytest.mark.parametrize("triton", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim", "tokens"), [(1, 2, 2, 8, 1), (70, 6, 2, 80, 300)])
def test_attention_received(
    rows: int, heads: int, kv_heads: int, head_dim: int, tokens: int, softcap: float | None, dtype: torch.dtype, triton
) -> None:
    """Each query row's softmax over the block, in fp64; the mean over rows and the group's heads. Ragged lengths."""
    torch.manual_seed(rows)
    query = torch.randn(heads, rows, head_dim).to(dtype).transpose(0, 1)
    k = torch.randn(kv_heads, tokens, head_dim).to(dtype).transpose(0, 1)
    repeated = k.double().repeat_interleave(heads // kv_heads, 1)
    logits = torch.einsum("rhd,khd->hrk", query.double(), repeated) * 0.3
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = logits.softmax(-1).mean(1).unflatten(0, (kv_heads, -1)).mean(1)
    actual = attention_received(query, k, 0.3, softcap, triton=triton)
    tolerance = 1e-5 if dtype == torch.float32 or triton else 2e-3  # torch rounds logits to 16 bits
    torch.testing.assert_close(actual, wanted.float(), rtol=tolerance, atol=tolerance / tokens)


@pytest.mark.parametrize("triton", ENGINES)
@pytest.mark.parametrize(("rows", "softcap"), [(5, None), (70, 2.0)])
def test_attention_received_of_a_larger_whole(rows: int, softcap: float | None, triton: bool) -> None:
    """By log-sum-exps over three blocks, the weights of each block are its part of the softmax over all of them."""
    torch.manual_seed(rows)
    query, k = torch.randn(rows, 6, 16), torch.randn(300, 2, 16)
    logits = torch.einsum("rhd,khd->hrk", query.double(), k.double().repeat_interleave(3, 1)) * 0.7
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = logits.softmax(-1).mean(1).unflatten(0, (2, 3)).mean(1)
    lse = logits.logsumexp(-1).float()
    parts = [attention_received(query, part, 0.7, softcap, lse, triton=triton) for part in k.split([101, 150, 49])]
    torch.testing.assert_close(torch.cat(parts, 1), wanted.float(), rtol=1e-5, atol=1e-8)
    blocks = k[9:].unflatten(0, (3, 97))  # in one call
    together = attention_received(query, blocks, 0.7, softcap, lse, triton=triton)
    torch.testing.assert_close(together.transpose(0, 1).flatten(1), wanted[:, 9:].float(), rtol=1e-5, atol=1e-8)
    alone = [attention_received(query, block, 0.7, softcap, triton=triton) for block in blocks]
    assert torch.equal(attention_received(query, blocks, 0.7, softcap, triton=triton), torch.stack(alone))


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=9, max_size=9), min_size=1, max_size=3))
def test_pool(scores: list[list[float]]) -> None:
    """Max over five tokens around each, the block's edges cut, no token of another KV head."""
    assert pool(torch.tensor(scores)).tolist() == [pooled_by_hand(row) for row in scores]


rows = st.lists(st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 1e-40, 1.0, 3.0, math.inf]), min_size=10, max_size=10)


@pytest.mark.parametrize("triton", ENGINES)
@settings(max_examples=25)
@given(st.lists(rows, min_size=1, max_size=3), st.integers(0, 10), st.integers(0, 10), st.booleans())
def test_choose(triton: bool, scores: list[list[float]], count: int, selectable: int, pooled: bool) -> None:
    """The best of the last `selectable` tokens of each KV head, ascending; of equal scores the earlier token. Pooling
    looks at the neighbours that may not be chosen as well."""
    actual = choose(torch.tensor(scores), count, selectable, pooled=pooled, triton=triton)
    count = min(count, selectable)
    assert actual.shape == (len(scores), count)
    for row, chosen in zip(scores, actual.tolist(), strict=True):
        ranked = pooled_by_hand(row) if pooled else row
        order = sorted(range(10 - selectable, 10), key=lambda token: (-ranked[token], token))
        assert chosen == sorted(order[:count])


def test_choose_takes_no_more_than_there_are() -> None:
    """Asked for more than may be chosen, it gives those that may be: never a token of the anchor."""
    assert choose(torch.tensor([[9.0, 8.0, 1.0, 2.0]]), 3, 2, pooled=False).tolist() == [[2, 3]]
    assert choose(torch.tensor([[9.0, 8.0]]), 3, 0, pooled=False).shape == (1, 0)


def draw(kind: str, kv_heads: int, tokens: int) -> Tensor:
    """Scores (kv_heads, tokens) with few ties, many, all alike, not-a-number among them, or in peculiar strides."""
    scores = torch.rand(kv_heads, tokens)
    if kind == "ties":
        return scores.mul(20).floor()
    if kind == "alike":
        return torch.full((kv_heads, tokens), 0.5)
    if kind == "nan":
        return torch.where(scores < 0.1, math.nan, scores) * torch.where(scores < 0.05, -1, 1)
    if kind == "strided":
        return torch.randn(tokens, kv_heads).T
    return torch.arange(tokens, dtype=torch.float32).expand(kv_heads, tokens) if kind == "expanded" else scores - 0.5


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["few ties", "ties", "alike", "nan", "strided", "expanded"])
@pytest.mark.parametrize(("tokens", "selectable", "count"), [(1, 1, 1), (4500, 4500, 625), (2500, 2333, 2332)])
def test_kernel_chooses_as_torch_does(
    kind: str, tokens: int, selectable: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one token, of several chunks with a ragged last one, nearly all tokens chosen; any scores."""
    monkeypatch.setattr(selection, "_CHUNK", 2048)
    torch.manual_seed(tokens)
    scores = draw(kind, 2, tokens)
    for pooled in (False, True):
        wanted = choose(scores, count, selectable, pooled=pooled, triton=False)
        assert torch.equal(choose(scores, count, selectable, pooled=pooled, triton=True), wanted)


@pytest.mark.parametrize("triton", ENGINES)
@given(st.integers(1, 70), st.sampled_from([torch.float16, torch.float32]), st.sampled_from([8, 80]), st.booleans())
@example(70, torch.float16, 128, True)
@settings(max_examples=10)
def test_pack(triton: bool, count: int, dtype: torch.dtype, head_dim: int, heads_first: bool) -> None:
    """Each KV head gives its own rows, in the order asked for, into a part of a larger buffer; the rest stays."""
    tokens, kv_heads = 90, 3
    k, v = torch.arange(2.0 * tokens * kv_heads * head_dim).remainder(2039).to(dtype).view(2, kv_heads, tokens, -1)
    k = k.transpose(0, 1)
    v = v.transpose(0, 1) if heads_first else v.transpose(0, 1).contiguous()
    chosen = torch.stack([torch.randperm(tokens)[:count].sort().values for _ in range(kv_heads)])
    buffer = torch.full((2, kv_heads, count + 9, head_dim), math.nan, dtype=dtype)
    out = buffer.transpose(1, 2)[:, 4 : 4 + count]
    pack(k, v, chosen, out, triton=triton)
    for head in range(kv_heads):
        assert torch.equal(buffer[0, head, 4 : 4 + count], k[chosen[head], head])
        assert torch.equal(buffer[1, head, 4 : 4 + count], v[chosen[head], head])
    assert buffer[:, :, :4].isnan().all() and buffer[:, :, 4 + count :].isnan().all()


def test_nothing_to_pack() -> None:
    """A block that passes nothing leaves the buffer as it is."""
    k = torch.ones(5, 2, 8)
    out = torch.full((2, 3, 2, 8), math.nan)
    pack(k, k, choose(torch.rand(2, 5), 0, 5, pooled=True), out[:, :0])
    assert out.isnan().all()
