"""Attention of few rows over many keys, in plain Triton: the keys are split over programs, then the parts are merged.

Flash-decoding (Dao et al., 2023): with one row per head there are too few tiles to fill a GPU, so every program takes a
run of keys, for all query heads of a group at once, and stores its output with its log-sum-exp. The number of keys is
read on the device, so that a CUDA graph captured once serves every length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import on_device_of
from .merging import launch_merge, padded

LN2 = tl.constexpr(math.log(2))
# Rows times heads of a group that one program takes at most.
_MOST_ROWS = 64
# Programs per multiprocessor: as many as fit at a time, so that all end together, with enough loads in flight.
_PROGRAMS_PER_PROCESSOR = 2
_STAGES = 3


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    length: Tensor | None = None,
    softcap: float | None = None,
    partial: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows over the first ``length`` keys of a cache, in two launches.

    Args:
        q: (rows, heads, head_dim), bf16, fp16 or fp32, any strides.
        k, v: (capacity, kv_heads, head_dim) of q's dtype and device, any strides.
        scale: positive factor on q.k.
        causal: the last keys are those of the rows, aligned at the bottom right as in :class:`apb.Segment`.
        length: (1,) int32 on the device, at most the capacity; by default the capacity.
        softcap: logits x become softcap * tanh(x / softcap).
        partial: return out in fp32, to be merged with results over other keys; out and lse are then views of one
            tensor (rows, heads, head_dim + 1), as messages between ranks are.

    Returns:
        out (rows, heads, head_dim) in q's dtype, or fp32, and lse (heads, rows) fp32, as :func:`apb.attention`.
    """
    rows = q.shape[0]
    capacity, kv_heads, _ = k.shape
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    if length is None:
        length = torch.full((1,), capacity, dtype=torch.int32, device=q.device)
    log2e = 1 / math.log(2)
    factors = (scale * log2e, 1.0) if softcap is None else (softcap * log2e, 2 * scale / softcap * log2e)

    def split(grid: tuple[int, int, int], parts: Tensor, sums: Tensor, **options: int) -> None:
        _split[grid](
            q, k, v, parts, sums, length, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], rows, grid[0], *factors,
            CAUSAL=causal, CAPPED=softcap is not None, **options,
        )  # fmt: skip

    # No more splits than the capacity has work for: the length is on the device, and reading it would wait.
    return _in_parts(q, kv_heads, capacity, partial, split)


def cached_attention(
    q: Tensor, table: Tensor, layer: int, kv_heads: int, scale: float, length: Tensor, *, partial: bool = False
) -> tuple[Tensor, Tensor]:
    """A row of each of some sessions over the first keys of its own cache, whose addresses are read by the kernel.

    A CUDA graph that was captured once serves any such number of caches, each of any capacity: write their addresses
    to the table.

    Args:
        q: (sessions, heads, head_dim), bf16, fp16 or fp32, any strides.
        table: (layers, sessions, 3) int64 on the device: for each layer and session the addresses of its keys and its
            values, which are contiguous (kv_heads, capacity, head_dim) of q's dtype and begin at multiples of 16 bytes,
            and the capacity.
        layer: row of the table.
        kv_heads: heads of the keys and values.
        scale: positive factor on q.k.
        length: (sessions,) int32 on the device, the number of keys that each row sees, at most the capacity.
        partial: as in :func:`attention`.

    Returns:
        As :func:`attention`.
    """
    q = q if q.stride(2) == 1 else q.contiguous()

    def split(grid: tuple[int, int, int], parts: Tensor, sums: Tensor, **options: int) -> None:
        _split_cached[grid](
            q, table, layer, parts, sums, length, *q.stride()[:2], len(q), grid[0], scale / math.log(2), **options
        )

    return _in_parts(q, kv_heads, None, partial, split, apart=True)


def append(k: Tensor, v: Tensor, table: Tensor, layer: int, slot: Tensor) -> None:
    """Write a token's keys and values to a slot of each cache, whose addresses are read when the kernel runs.

    Args:
        k, v: (sessions, kv_heads, head_dim) of the storage's dtype, any strides.
        table, layer: as in :func:`cached_attention`.
        slot: (sessions,) int64 on the device, less than the capacity.
    """
    sessions, kv_heads, head_dim = k.shape
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    with on_device_of(k):
        _append[(kv_heads, sessions)](
            k, v, table, layer, slot, *k.stride()[:2], *v.stride()[:2], D=head_dim, BD=padded(head_dim), num_warps=1
        )


def _in_parts(
    q: Tensor, kv_heads: int, capacity: int | None, partial: bool, split: Callable[..., None], apart: bool = False
) -> tuple[Tensor, Tensor]:
    """Split the keys over programs, as many as fill the GPU, or the capacity, and merge the parts.

    ``apart``: every row has keys of its own.
    """
    rows, heads, head_dim = q.shape
    group = heads // kv_heads
    width = padded(head_dim)
    caches, beside = (rows, 1) if apart else (1, rows)
    packed = min(max(16, 1 << (beside * group - 1).bit_length()), _MOST_ROWS)
    blocks = triton.cdiv(beside * group, packed)
    block_n = 64 if width * q.element_size() <= 256 else 32
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    programs = processors * _PROGRAMS_PER_PROCESSOR
    # Of many caches one may be far longer than the others, and is still read when they have been: by enough programs.
    programs = max(programs // caches, min(programs, processors // 2))
    splits = programs // (kv_heads * blocks)
    if capacity is not None:
        splits = min(splits, triton.cdiv(capacity, 4 * block_n))
    splits = max(1, splits)
    parts = q.new_empty(splits, rows, heads, head_dim, dtype=torch.float32)
    sums = q.new_empty(splits, heads, rows, dtype=torch.float32)
    if partial:
        message = q.new_empty(rows, heads, head_dim + 1, dtype=torch.float32)
        out, lse = message[..., :-1], message[..., -1].T
    else:
        out, lse = q.new_empty(rows, heads, head_dim), q.new_empty(heads, rows, dtype=torch.float32)
    with on_device_of(q):
        split(
            (splits, kv_heads, blocks * caches), parts, sums, H=heads, GROUP=group, D=head_dim, BD=width, BM=packed,
            BN=block_n, num_warps=4, num_stages=_STAGES,
        )  # fmt: skip
    launch_merge(parts, sums.transpose(1, 2), out, lse.T)
    return out, lse


@triton.jit(do_not_specialize=["rows", "splits"])
def _split(
    q, k, v, parts, sums, length, q_row, q_head, k_row, k_head, v_row, v_head, rows, splits, scale, cap,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One run of keys of one KV head, at addresses given at launch."""
    kv_head = tl.program_id(1).to(tl.int64)
    _attend(
        q, k + kv_head * k_head, v + kv_head * v_head, parts, sums, length, q_row, q_head, k_row, v_row,
        tl.program_id(2), rows, rows, splits, scale, cap, H, GROUP, D, BD, BM, BN, CAUSAL, CAPPED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "sessions", "splits"])
def _split_cached(
    q, table, layer, parts, sums, length, q_row, q_head, sessions, splits, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same for one session's only row, at addresses from the table."""
    blocks: tl.constexpr = (GROUP + BM - 1) // BM
    session = (tl.program_id(2) // blocks).to(tl.int64)
    k, v, capacity = storage(table, layer * sessions + session, q.dtype.element_ty)
    head = tl.program_id(1).to(tl.int64) * capacity * D
    _attend(
        q + session * q_row, k + head, v + head, parts + session * H * D, sums + session, length + session,
        0, q_head, D, D, tl.program_id(2) % blocks, 1, sessions, splits,
        scale, 1.0, H, GROUP, D, BD, BM, BN, False, False,
    )  # fmt: skip


@triton.jit
def storage(table, place, dtype: tl.constexpr):
    """Pointers to keys and values in a place of the table, and their capacity."""
    row = table + 3 * place
    # The compiler tracks alignment only of the pointer itself, which it needs for loads 16 bytes wide.
    k = tl.multiple_of(tl.load(row).to(tl.pointer_type(dtype)), 16)
    v = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(dtype)), 16)
    return k, v, tl.load(row + 2)


@triton.jit(do_not_specialize=["layer"])
def _append(k, v, table, layer, slot, k_row, k_head, v_row, v_head, D: tl.constexpr, BD: tl.constexpr):
    """One KV head's key and value of one session."""
    kv_head = tl.program_id(0).to(tl.int64)
    session = tl.program_id(1).to(tl.int64)
    keys, values, capacity = storage(table, layer * tl.num_programs(1) + session, k.dtype.element_ty)
    at = (kv_head * capacity + tl.load(slot + session)) * D
    dims = tl.arange(0, BD)
    k += session * k_row + kv_head * k_head
    v += session * v_row + kv_head * v_head
    tl.store(keys + at + dims, tl.load(k + dims, mask=dims < D), mask=dims < D)
    tl.store(values + at + dims, tl.load(v + dims, mask=dims < D), mask=dims < D)


@triton.jit
def _attend(
    q, k, v, parts, sums, length, q_row, q_head, k_row, v_row, block, rows, all_rows, splits, scale, cap,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One run of keys of the KV head at k and v, for the rows of all heads of its group: row i is of head i % GROUP.

    ``rows`` see these keys, of ``all_rows`` in every part.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    packed = block * BM + tl.arange(0, BM)
    row = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    keys = tl.load(length)
    share = tl.cdiv(tl.cdiv(keys, BN), splits)
    cols = tl.arange(0, BN)
    dims = tl.arange(0, BD)
    here = (row < rows)[:, None] & (dims < D)[None, :]
    query = tl.load(q + row[:, None] * q_row + head[:, None] * q_head + dims[None, :], mask=here, other=0.0)
    seen = keys + row * 0
    if CAUSAL:
        seen = keys - rows + row + 1
    acc = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    for tile in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(keys, BN))):
        key = tile * BN
        there = key + cols < keys
        at = key.to(tl.int64)
        there_k = (dims < D)[:, None] & there[None, :]
        x = tl.load(k + at * k_row + dims[:, None] + cols[None, :] * k_row, mask=there_k, other=0.0)
        s = tl.dot(query, x, input_precision="ieee")
        if CAPPED:
            s = 1.0 - 2.0 / (tl.exp2(s * cap) + 1.0)  # tanh
        there_v = (dims < D)[None, :] & there[:, None]
        x = tl.load(v + at * v_row + cols[:, None] * v_row + dims[None, :], mask=there_v, other=0.0)
        acc, total, m = absorb(acc, total, m, s, (key + cols)[None, :] < seen[:, None], x, scale)
    out, lse = settled(acc, total, m)
    at = (split * all_rows + row) * H + head
    tl.store(parts + at.to(tl.int64)[:, None] * D + dims[None, :], out, mask=here)
    at = (split * H + head) * all_rows + row
    tl.store(sums + at, lse, mask=row < rows)


@triton.jit
def absorb(acc, total, m, s, seen, x, scale):
    """Add a tile of keys to an online softmax: logits s (rows, keys) by ``scale`` in base 2, where seen, and values x.

    So far, by row: acc, the sum of values weighted by exponentials, whose sum is ``total``, both times 2 ** -m.
    """
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1) * scale)
    # A row may have seen nothing yet: (-inf) - (-inf) would be nan.
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.where(seen, tl.exp2(s * scale - shift[:, None]), 0.0)
    alpha = tl.exp2(m - shift)
    near = p.to(x.dtype)
    acc = tl.dot(near, x, acc * alpha[:, None], input_precision="ieee")
    if x.dtype != tl.float32:
        # 16 bits hold a probability to 3 digits. A second product adds the rest: the time goes into reading.
        acc = tl.dot((p - near.to(tl.float32)).to(x.dtype), x, acc, input_precision="ieee")
    return acc, total * alpha + tl.sum(p, 1), new


@triton.jit
def settled(acc, total, m):
    """Output and log-sum-exp, natural, of what :func:`absorb` has added up."""
    some = total > 0.0
    safe = tl.where(some, total, 1.0)
    return acc / safe[:, None], tl.where(some, (m + tl.log2(safe)) * LN2, float("-inf"))
