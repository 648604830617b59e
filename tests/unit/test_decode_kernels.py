"""Kernels of decode that find keys and values by a table of addresses, interpreted, beside those that are told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.triton


def storages(kv_heads: int, head_dim: int, dtype: torch.dtype, *capacities: int) -> tuple[list[list[Tensor]], Tensor]:
    """Keys and values (kv_heads, capacity, head_dim) of layers, all not-a-number, and the table of where they lie."""
    layers = [
        [torch.full((kv_heads, capacity, head_dim), math.nan, dtype=dtype) for _ in "kv"] for capacity in capacities
    ]
    return layers, torch.tensor([[k.data_ptr(), v.data_ptr(), k.shape[1]] for k, v in layers])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [(4, 2, 16, torch.float32), (8, 1, 64, torch.float16), (3, 3, 20, torch.float32)],
)
@pytest.mark.parametrize(("length", "splits"), [(0, 3), (1, 1), (157, 1), (157, 3)])
def test_attention_by_the_table(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    length: int,
    splits: int,
) -> None:
    """Every layer, whatever its capacity, gives what attention over the tensors themselves gives; in one split, to the
    bit. What lies behind the length is not read."""
    from apb.kernels import decode

    monkeypatch.setattr(decode, "_PROGRAMS_PER_PROCESSOR", splits * kv_heads)
    torch.manual_seed(0)
    q = torch.randn(heads, 1, head_dim).to(dtype).transpose(0, 1)
    held = torch.tensor([length], dtype=torch.int32)
    layers, table = storages(kv_heads, head_dim, dtype, 157, 200)
    for layer, (k, v) in enumerate(layers):
        k[:, :length], v[:, :length] = torch.randn(2, kv_heads, length, head_dim)
        plain = decode.attention(q, k.transpose(0, 1), v.transpose(0, 1), 0.3, length=held, partial=layer == 1)
        found = decode.cached_attention(q, table, layer, kv_heads, 0.3, held, partial=layer == 1)
        for x, wanted in zip(found, plain, strict=True):
            assert x.dtype == wanted.dtype
            tolerance = 0.0 if splits == 1 else 1e-3 if x.dtype == torch.float16 else 1e-5
            torch.testing.assert_close(x, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 16), (3, 20)])
def test_append_writes_one_slot(kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """One row of every head, in the layer that was named, and nothing beside it; from states of any strides."""
    from apb.kernels import decode

    layers, table = storages(kv_heads, head_dim, dtype, 9, 31, 7)
    for slot in (0, 30):
        k, v = torch.randn(head_dim, kv_heads).to(dtype).T, torch.randn(kv_heads, 2 * head_dim).to(dtype)[:, ::2]
        before = [[x.clone() for x in layer] for layer in layers]
        decode.append(k, v, table, 1, torch.tensor([slot]))
        for x, new in zip(before[1], (k, v), strict=True):
            x[:, slot] = new
        for layer, wanted in zip(layers, before, strict=True):
            torch.testing.assert_close(layer, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_partial_results_travel_and_merge(ranks: int, dtype: torch.dtype) -> None:
    """A partial result is its own message; merged in one launch they are attention over all keys."""
    from apb.kernels import decode, reference
    from apb.kernels.merge import pack
    from apb.kernels.segment import Segment

    torch.manual_seed(0)
    q, k, v = (torch.randn(count, heads, 20).to(dtype) for count, heads in ((3, 4), (90, 2), (90, 2)))
    messages = []
    for length in [50, *[40] * (ranks == 2), *(0, 40) * (ranks == 3)]:
        start = 0 if length == 50 else 50
        held = torch.tensor([length], dtype=torch.int32)
        partial = decode.attention(q, k[start:], v[start:], 0.3, length=held, partial=True)
        messages.append(pack(*partial))
        assert messages[-1].data_ptr() == partial[0].data_ptr()
        torch.testing.assert_close(
            messages[-1], torch.cat([partial[0], partial[1].T.unsqueeze(-1)], -1), rtol=0, atol=0
        )
    out, lse = decode.merge(torch.stack(messages), dtype)
    wanted, wanted_lse = reference.attention(q.float(), [Segment(k.float(), v.float())], 0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads, head_dim", [(3, 20), (2, 64)])
def test_a_part_is_merged_in_place(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Views of other tensors, rows that one part, the other or neither has keys for; the rest stays as it was."""
    from apb.kernels.merge_pair import merge_into

    torch.manual_seed(0)
    whole, rows = torch.randn(40, heads, head_dim).to(dtype), slice(2, 39)
    lses, other = torch.randn(heads, 40) * 3, torch.randn(heads, 37, 2 * head_dim).to(dtype)[:, :, :head_dim]
    other, other_lse = other.transpose(0, 1), torch.randn(37, heads).T * 3
    lses[:, 4:9], other_lse[:, 5:12] = -torch.inf, -torch.inf  # rows 4 to 8 of all, rows 7 to 13 of all
    whole[lses.T.isneginf()] = 0
    before, before_lse = whole.clone(), lses.clone()
    weights = torch.stack([before_lse[:, rows], other_lse]).double().exp()
    share = (weights / weights.sum(0).clamp(min=1e-300)).transpose(1, 2).unsqueeze(-1)
    wanted = before[rows].double() * share[0] + other.double() * share[1]
    merge_into(whole[rows], lses[:, rows], other, other_lse)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(whole[rows].double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lses[:, rows].double(), weights.sum(0).log(), rtol=1e-5, atol=1e-5)
    untouched = [0, 1, 39]
    torch.testing.assert_close(whole[untouched], before[untouched], rtol=0, atol=0)
    torch.testing.assert_close(lses[:, untouched], before_lse[:, untouched], rtol=0, atol=0)
