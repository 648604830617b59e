"""Kernels of decode that find keys and values by a table of addresses, interpreted, beside those that are told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.triton


def storages(kv_heads: int, head_dim: int, dtype: torch.dtype, *capacities: int) -> tuple[list[list[Tensor]], Tensor]:
    """Keys and values (kv_heads, capacity, head_dim) of layers of one session, or of several, all not-a-number, and the
    table of where they lie, one after the other."""
    stored = [
        [torch.full((kv_heads, capacity, head_dim), math.nan, dtype=dtype) for _ in "kv"] for capacity in capacities
    ]
    return stored, torch.tensor([[k.data_ptr(), v.data_ptr(), k.shape[1]] for k, v in stored])


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


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "lengths"),
    [
        (4, 2, 16, torch.float32, (157, 1, 0, 64, 300)),
        (8, 1, 64, torch.float16, (157, 0, 64)),
        (3, 3, 20, torch.float32, (157, 0, 64)),
        (66, 1, 16, torch.float32, (70, 0)),
    ],
)
@pytest.mark.parametrize(("splits", "partial"), [(1, True), (4, False)])
def test_each_session_attends_to_its_own_keys(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    splits: int,
    partial: bool,
) -> None:
    """Sessions of any lengths, in caches of any capacities, one of them of no key: the reference's numbers of each; in
    more heads to a KV head, too, than a program takes. What lies behind a length is not read."""
    from apb.kernels import decode, reference
    from apb.kernels.segment import Segment

    capacities = tuple(length if length > 100 else length + 9 for length in lengths)
    blocks = -(-heads // kv_heads // 64)
    monkeypatch.setattr(decode, "_PROGRAMS_PER_PROCESSOR", splits * kv_heads * blocks * len(lengths))
    torch.manual_seed(0)
    q = torch.randn(heads, len(lengths), head_dim).to(dtype).transpose(0, 1)
    for layer in range(2):
        stored, table = storages(kv_heads, head_dim, dtype, *(capacities if layer else capacities[::-1]) * 2)
        mine = stored[len(lengths) * layer :][: len(lengths)]
        held = [min(length, k.shape[1]) for length, (k, _) in zip(lengths, mine, strict=True)]
        for count, (k, v) in zip(held, mine, strict=True):
            k[:, :count], v[:, :count] = torch.randn(2, kv_heads, count, head_dim)
        length = torch.tensor(held, dtype=torch.int32)
        out, lse = decode.cached_attention(
            q, table.view(2, len(lengths), 3), layer, kv_heads, 0.3, length, partial=partial
        )
        assert out.dtype == (torch.float32 if partial else dtype)
        for session, (count, pair) in enumerate(zip(held, mine, strict=True)):
            own = Segment(*(x[:, :count].transpose(0, 1).float() for x in pair))
            wanted, wanted_lse = reference.attention(q[session : session + 1].float(), [own], 0.3)
            tolerance = 2e-3 if out.dtype == torch.float16 else 1e-5
            torch.testing.assert_close(out[session].float(), wanted[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse[:, session], wanted_lse[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 16), (3, 20)])
def test_append_writes_one_slot(kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """One row of every head, in the layer that was named, and nothing beside it; from states of any strides."""
    from apb.kernels import decode

    layers, table = storages(kv_heads, head_dim, dtype, 9, 31, 7)
    for slot in (0, 30):
        k, v = torch.randn(head_dim, kv_heads).to(dtype).T, torch.randn(kv_heads, 2 * head_dim).to(dtype)[:, ::2]
        before = [[x.clone() for x in layer] for layer in layers]
        decode.append(k[None], v[None], table, 1, torch.tensor([slot]))
        for x, new in zip(before[1], (k, v), strict=True):
            x[:, slot] = new
        for layer, wanted in zip(layers, before, strict=True):
            torch.testing.assert_close(layer, wanted, rtol=0, atol=0, equal_nan=True)


def test_append_of_several_sessions() -> None:
    """Each session's row in a slot of its own cache."""
    from apb.kernels import decode

    stored, table = storages(2, 16, torch.float32, *[9] * 3, 31, 7, 12)
    k, v = torch.randn(2, 3, 16).transpose(0, 1), torch.randn(3, 2, 16)
    before = [[x.clone() for x in pair] for pair in stored]
    slots = (30, 6, 0)
    decode.append(k, v, table.view(2, 3, 3), 1, torch.tensor(slots))
    for session, slot in enumerate(slots):
        for x, new in zip(before[3 + session], (k[session], v[session]), strict=True):
            x[:, slot] = new
    for pair, wanted in zip(stored, before, strict=True):
        torch.testing.assert_close(pair, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_partial_results_travel_and_merge(ranks: int, dtype: torch.dtype) -> None:
    """A partial result is its own message; merged in one launch they are attention over all keys."""
    from apb.kernels import decode, merging, reference
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
    out, lse = merging.merge(torch.stack(messages), dtype)
    wanted, wanted_lse = reference.attention(q.float(), [Segment(k.float(), v.float())], 0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads, head_dim", [(3, 20), (2, 64)])
def test_a_part_is_merged_in_place(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Views of other tensors, rows that one part, the other or neither has keys for; the rest stays as it was."""
    from apb.kernels.merging import merge_into

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
