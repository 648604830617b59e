"""Kernels of attention over listed keys, and those behind them, in plain Triton; the list is of :mod:`.choosing`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode import absorb, settled, storage
from . import COLUMNS
from .choosing import covered_of, far_of, list_of, room_of

_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit(do_not_specialize=["layer", "programs"])
def attend(
    q, storages, table, layer, counts, spans, parts, sums, length, q_head, programs, scale,
    H: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, PAGE: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One run of one KV head's chosen keys, for all heads of its group.

    KV heads may have chosen different numbers of keys: each has programs in proportion, as ``spans`` says, the first
    of each in spans[0], their number in spans[1].
    """
    program = tl.program_id(0)
    WIDTH: tl.constexpr = PAGE if PAGE > 0 else 1  # keys of an entry of the list
    row = table + layer * _COLUMNS
    covered = covered_of(row)
    rest = tl.load(length) - covered
    kv, chunks = tl.arange(0, BK), tl.arange(0, CHUNKS)
    each = tl.load(counts + kv[:, None] * CHUNKS + chunks[None, :], mask=(kv < KV)[:, None], other=0)
    rest_tiles = tl.cdiv(rest, BN)
    tiles = tl.where(kv < KV, tl.sum(tl.cdiv(each * WIDTH, BN), 1) + rest_tiles, 0)
    every = tl.maximum(tl.sum(tiles, 0), 1)
    shares = (tiles * (programs - KV) + every - 1) // every  # rounded up: KV more at most
    starts = tl.cumsum(shares, 0) - shares
    if program == 0:
        tl.store(spans + kv, starts, mask=kv < KV)
        tl.store(spans + KV + kv, shares, mask=kv < KV)
    kv_head = tl.sum(((starts <= program) & (kv < KV)).to(tl.int32), 0) - 1
    mine = kv == kv_head
    place = program - tl.sum(tl.where(mine, starts, 0), 0)
    mine_tiles = tl.sum(tl.where(mine, tiles, 0), 0)
    run = tl.cdiv(mine_tiles, tl.maximum(tl.sum(tl.where(mine, shares, 0), 0), 1))

    # A tile is of one chunk, or of the keys that no index covers.
    count = tl.load(counts + kv_head * CHUNKS + chunks) * WIDTH
    ends = tl.cumsum(tl.cdiv(count, BN), 0)
    listed_tiles = mine_tiles - rest_tiles
    room = room_of(row, CHUNKS, PAGE)
    listed = list_of(row, H, KV) + (kv_head * CHUNKS).to(tl.int64) * room
    k, v, capacity = storage(storages, layer, q.dtype.element_ty)
    k += kv_head.to(tl.int64) * capacity * D
    v += kv_head.to(tl.int64) * capacity * D
    if FAR:
        far_k, far_v, far_capacity, away = far_of(row, q.dtype.element_ty)
        far_k += kv_head.to(tl.int64) * far_capacity * D
        far_v += kv_head.to(tl.int64) * far_capacity * D
    cols, dims, group = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BM)
    head = kv_head * GROUP + group
    here = (group < GROUP)[:, None] & (dims < D)[None, :]
    query = tl.load(q + head[:, None] * q_head + dims[None, :], mask=here, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    for tile in range(place * run, tl.minimum((place + 1) * run, mine_tiles)):
        chunk = tl.sum((ends <= tile).to(tl.int32), 0)  # CHUNKS for the rest
        mine_chunk = chunks == chunk
        inner = (tile - tl.sum(tl.where(mine_chunk, ends - tl.cdiv(count, BN), 0), 0)) * BN + cols
        inside = inner < tl.sum(tl.where(mine_chunk, count, 0), 0)
        entry = tl.load(listed + chunk * room + inner // WIDTH, mask=inside, other=0)
        beyond = (tile - listed_tiles) * BN + cols
        there = inside | (beyond >= 0) & (beyond < rest)
        token = tl.where(beyond >= 0, covered + beyond, entry * WIDTH + inner % WIDTH).to(tl.int64)
        keys, values = k, v
        if FAR:
            keys = tl.where(token < away, far_k, k)[None, :]
            values = tl.where(token < away, far_v, v)[:, None]
        x = tl.load(keys + token[None, :] * D + dims[:, None], mask=(dims < D)[:, None] & there[None, :], other=0.0)
        s = tl.dot(query, x, input_precision="ieee")
        x = tl.load(values + token[:, None] * D + dims[None, :], mask=(dims < D)[None, :] & there[:, None], other=0.0)
        acc, total, m = absorb(acc, total, m, s, there[None, :], x, scale)
    out, lse = settled(acc, total, m)
    at = program * GROUP + group
    tl.store(parts + at.to(tl.int64)[:, None] * D + dims[None, :], out, mask=here)
    tl.store(sums + at, lse, mask=group < GROUP)


@triton.jit
def merge(
    parts, sums, spans, out, lse, out_head, lse_head,
    KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One head: the parts of its KV head's programs, weighted by their share of the sum of exponentials."""
    head = tl.program_id(0)
    kv_head = head // GROUP
    start, count = tl.load(spans + kv_head), tl.load(spans + KV + kv_head)
    dims = tl.arange(0, BD)
    acc = tl.zeros([BD], tl.float32)
    total = tl.full([], 0.0, tl.float32)
    m = tl.full([], float("-inf"), tl.float32)
    for first in range(0, count, BS):
        part = first + tl.arange(0, BS)
        at = (start + part) * GROUP + head % GROUP
        each = tl.load(sums + at, mask=part < count, other=float("-inf"))
        new = tl.maximum(m, tl.max(each, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weights, alpha = tl.exp(each - shift), tl.exp(m - shift)
        inside = (part < count)[:, None] & (dims < D)[None, :]
        x = tl.load(parts + at.to(tl.int64)[:, None] * D + dims[None, :], mask=inside, other=0.0)
        acc = acc * alpha + tl.sum(x * weights[:, None], 0)
        total = total * alpha + tl.sum(weights, 0)
        m = new
    some = total > 0.0
    safe = tl.where(some, total, 1.0)
    tl.store(out + head * out_head + dims, (acc / safe).to(out.dtype.element_ty), mask=dims < D)
    tl.store(lse + head * lse_head, tl.where(some, m + tl.log(safe), float("-inf")))
