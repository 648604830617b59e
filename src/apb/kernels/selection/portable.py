"""Selection in plain Triton: two launches to score by the query rows, one to choose, one to copy."""

from __future__ import annotations

import triton
import triton.language as tl

# Rank of padding: below that of minus infinity, so that no score has it.
_NOTHING = tl.constexpr(0)


@triton.jit
def _queries(q, packed, rows, kv_head, q_row, q_head, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """A tile (BM, BD) of the query rows of a group's heads: packed row i is row i // GROUP of head i % GROUP."""
    row = packed // GROUP
    dims = tl.arange(0, BD)
    at = row.to(tl.int64)[:, None] * q_row + (kv_head * GROUP + packed % GROUP).to(tl.int64)[:, None] * q_head
    return tl.load(q + at + dims[None, :], mask=(row < rows)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _keys(k, token, tokens, k_row, D: tl.constexpr, BD: tl.constexpr):
    """A tile of keys, transposed: (BD, BN)."""
    dims = tl.arange(0, BD)
    at = token.to(tl.int64)[None, :] * k_row + dims[:, None]
    return tl.load(k + at, mask=(dims < D)[:, None] & (token < tokens)[None, :], other=0.0)


@triton.jit
def _logits(query, keys, scale, cap, CAPPED: tl.constexpr):
    """Logits (BM, BN), in base 2, of a tile of rows over a tile of keys."""
    s = tl.dot(query, keys, input_precision="ieee")
    if CAPPED:
        s = 1.0 - 2.0 / (tl.exp2(s * cap) + 1.0)  # tanh
    return s * scale


@triton.jit(do_not_specialize=["rows", "tokens", "kv_heads"])
def sum_exponentials(
    q, k, sums, rows, tokens, kv_heads, q_row, q_head, k_block, k_row, k_head, scale, cap,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """log2-sum-exp2 of the logits of a tile of rows over one split of one KV head's keys in one block."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    column, columns = tl.program_id(1), tl.num_programs(1)  # a KV head of a block
    block, kv_head = column // kv_heads, column % kv_heads
    packed = tl.program_id(2) * BM + tl.arange(0, BM)
    query = _queries(q, packed, rows, kv_head, q_row, q_head, GROUP, D, BD)
    k += block.to(tl.int64) * k_block + kv_head.to(tl.int64) * k_head
    share = tl.cdiv(tl.cdiv(tokens, BN), splits)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for tile in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(tokens, BN))):
        token = tile * BN + tl.arange(0, BN)
        s = _logits(query, _keys(k, token, tokens, k_row, D, BD), scale, cap, CAPPED)
        s = tl.where((token < tokens)[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))  # finite: every tile has a key
        total = total * tl.exp2(m - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
        m = new
    at = (split * columns + column).to(tl.int64) * (rows * GROUP) + packed
    # The last splits may have no tile.
    some = total > 0.0
    found = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(sums + at, found, mask=packed < rows * GROUP)


@triton.jit(do_not_specialize=["rows", "tokens", "kv_heads", "splits"])
def attention_received(
    q, k, sums, received, rows, tokens, kv_heads, splits, q_row, q_head, k_block, k_row, k_head, scale, cap,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Attention that one tile of keys of one KV head in one block receives, averaged over all rows."""
    column, columns = tl.program_id(1), tl.num_programs(1)
    block, kv_head = column // kv_heads, column % kv_heads
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.arange(0, BS)
    k += block.to(tl.int64) * k_block + kv_head.to(tl.int64) * k_head
    keys = _keys(k, token, tokens, k_row, D, BD)
    total = tl.zeros([BN], tl.float32)
    for first in range(0, rows * GROUP, BM):
        packed = first + tl.arange(0, BM)
        there = packed < rows * GROUP
        at = (split * columns + column).to(tl.int64)[:, None] * (rows * GROUP) + packed[None, :]
        each = tl.load(sums + at, mask=(split < splits)[:, None] & there[None, :], other=float("-inf"))
        top = tl.max(each, 0)
        top = tl.where(there, top, 0.0)
        each = tl.sum(tl.exp2(each - top[None, :]), 0)
        # Padding rows contribute nothing: 2 ** (s - inf) = 0.
        lse = tl.where(there, top + tl.log2(tl.where(there, each, 1.0)), float("inf"))
        s = _logits(_queries(q, packed, rows, kv_head, q_row, q_head, GROUP, D, BD), keys, scale, cap, CAPPED)
        total += tl.sum(tl.exp2(s - lse[:, None]), 0)
    at = column.to(tl.int64) * tokens + token
    tl.store(received + at, total / (rows * GROUP), mask=token < tokens)


@triton.jit
def _rank(scores, token, tokens, stride):
    """uint32 numbers in the order of the scores, with nan highest, as torch sorts it."""
    x = tl.load(scores + token.to(tl.int64) * stride, mask=(token >= 0) & (token < tokens), other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    rank = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(x == x, rank, 0xFFFFFFFF)


@triton.jit(do_not_specialize=["tokens", "first", "count"])
def choose(
    scores, ranks, chosen, tokens, first, count, score_head, score_token, POOLED: tl.constexpr, CHUNK: tl.constexpr
):
    """Kernel of :func:`apb.kernels.selection.choose` for one KV head; ``ranks`` is scratch, whole chunks per KV head.

    The rank of the last chosen token is found bit by bit, from the highest: it is the largest rank that at least
    ``count`` tokens reach.
    """
    head = tl.program_id(0).to(tl.int64)
    selectable = tokens - first
    scores += head * score_head
    ranks += head * (tl.cdiv(selectable, CHUNK) * CHUNK)
    chosen += head * count
    lanes = tl.arange(0, CHUNK)
    for start in range(0, selectable, CHUNK):
        token = first + start + lanes
        rank = _rank(scores, token, tokens, score_token)
        if POOLED:
            for away in tl.static_range(1, 3):
                rank = tl.maximum(rank, _rank(scores, token - away, tokens, score_token))
                rank = tl.maximum(rank, _rank(scores, token + away, tokens, score_token))
        tl.store(ranks + start + lanes, tl.where(token < tokens, rank, _NOTHING))
    tl.debug_barrier()  # other threads of the program read them
    last = tl.full([], 0, tl.uint32)
    above = 0  # number of tokens ranked above `last`
    for bit in range(32):
        candidate = last | (tl.full([], 1 << 31, tl.uint32) >> bit)
        reach = tl.zeros([CHUNK], tl.int32)
        for start in range(0, selectable, CHUNK):
            rank = tl.load(ranks + start + lanes)
            reach += (rank >= candidate).to(tl.int32)
        total = tl.sum(reach, 0)
        last = tl.where(total >= count, candidate, last)
        above = tl.where(total >= count, above, total)
    # `above` is the last count that fell short, which is that of `last` + 1: failed candidates bound it from above.
    tied = 0
    taken = 0
    for start in range(0, selectable, CHUNK):
        rank = tl.load(ranks + start + lanes)
        same = (rank == last).to(tl.int32)
        take = (rank > last) | ((rank == last) & (tied + tl.cumsum(same, 0) <= count - above))
        place = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(chosen + place, (first + start + lanes).to(tl.int64), mask=take)
        tied += tl.sum(same, 0)
        taken += tl.sum(take.to(tl.int32), 0)


@triton.jit(do_not_specialize=["count"])
def pack(
    k, v, chosen, out, count, k_row, k_head, v_row, v_head, out_pair, out_row, out_head,
    D: tl.constexpr, BD: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Kernel of :func:`apb.kernels.selection.pack`: PAIRS pairs of one KV head."""
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    token = tl.load(chosen + head * count + place, mask=place < count, other=0)
    dims = tl.arange(0, BD)
    here = (place < count)[:, None] & (dims < D)[None, :]
    out += head * out_head + place.to(tl.int64)[:, None] * out_row + dims[None, :]
    keys = tl.load(k + head * k_head + token[:, None] * k_row + dims[None, :], mask=here)
    values = tl.load(v + head * v_head + token[:, None] * v_row + dims[None, :], mask=here)
    tl.store(out, keys, mask=here)
    tl.store(out + out_pair, values, mask=here)
