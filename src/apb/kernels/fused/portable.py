"""The fused kernel in plain Triton, for any NVIDIA GPU that Triton supports and for Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
FIELDS = tl.constexpr(20)  # as in schedule.py


@triton.jit
def _part(
    acc, sums, m, q, k_ptr, v_ptr, k_row, v_row, first, tiles, keys, diagonal, rows, scale, cap,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Accumulate tiles [first, first + tiles) of one source; the pointers point at its first key."""
    cols = tl.arange(0, BN)
    dims = tl.arange(0, BD)
    for tile in range(first, first + tiles):
        key = tile * BN
        k_tile = k_ptr + key.to(tl.int64) * k_row + dims[:, None] + cols[None, :] * k_row
        v_tile = v_ptr + key.to(tl.int64) * v_row + cols[:, None] * v_row + dims[None, :]
        here = key + cols < (keys if MASKED else key + BN)
        k = tl.load(k_tile, mask=(dims[:, None] < D) & here[None, :], other=0.0)
        s = tl.dot(q, k, input_precision="ieee")
        if CAPPED:
            s = 1.0 - 2.0 / (tl.exp2(s * cap) + 1.0)  # tanh
        if MASKED:
            seen = tl.minimum(keys - key, rows + (diagonal + 1 - key))
            s = tl.where(cols[None, :] < seen[:, None], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1) * scale)
        # A row may have seen no key yet: (-inf) - (-inf) would be nan.
        shift = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
        p = tl.exp2(s * scale - shift[:, None])
        alpha = tl.exp2(m - shift)
        sums = sums * alpha + tl.sum(p, 1)
        v = tl.load(v_tile, mask=(dims[None, :] < D) & here[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = new
    return acc, sums, m


@triton.jit
def _source(
    acc, sums, m, q, k_ptr, v_ptr, k_row, v_row, k_head, v_head, strip, rows, kv_head, scale, cap,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    first = tl.load(strip).to(tl.int64)
    whole, masked = tl.load(strip + 1), tl.load(strip + 2)
    keys, diagonal = tl.load(strip + 3), tl.load(strip + 4)
    k_ptr += first * k_row + kv_head.to(tl.int64) * k_head
    v_ptr += first * v_row + kv_head.to(tl.int64) * v_head
    acc, sums, m = _part(
        acc, sums, m, q, k_ptr, v_ptr, k_row, v_row, whole, masked, keys, diagonal, rows, scale, cap,
        D, BD, BN, True, CAPPED,
    )  # fmt: skip
    return _part(
        acc, sums, m, q, k_ptr, v_ptr, k_row, v_row, 0, whole, keys, diagonal, rows, scale, cap,
        D, BD, BN, False, CAPPED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["lse_head"])
def forward(
    q, k0, v0, k1, v1, k2, v2, out, lse, q_row, q_head, k0_row, k0_head, v0_row, v0_head, k1_row, k1_head,
    v1_row, v1_head, k2_row, k2_head, v2_row, v2_head, out_row, out_head, lse_head, scale, cap, table, items,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SOURCES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Kernel of :func:`apb.kernels.fused.launch`: one program per item, in the order of the schedule."""
    item = tl.load(items + tl.program_id(0))
    head = item % H
    kv_head = head // GROUP
    strip = table + item // H * FIELDS
    rows = tl.load(strip) + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    here = (rows < tl.load(strip + 1))[:, None] & (dims < D)[None, :]
    q_tile = q + head.to(tl.int64) * q_head + rows.to(tl.int64)[:, None] * q_row + dims[None, :]
    query = tl.load(q_tile, mask=here, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    sums = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    acc, sums, m = _source(
        acc, sums, m, query, k0, v0, k0_row, v0_row, k0_head, v0_head, strip + 2, rows, kv_head, scale, cap,
        D, BD, BN, CAPPED,
    )  # fmt: skip
    if SOURCES > 1:
        acc, sums, m = _source(
            acc, sums, m, query, k1, v1, k1_row, v1_row, k1_head, v1_head, strip + 7, rows, kv_head, scale, cap,
            D, BD, BN, CAPPED,
        )  # fmt: skip
    if SOURCES > 2:
        acc, sums, m = _source(
            acc, sums, m, query, k2, v2, k2_row, v2_row, k2_head, v2_head, strip + 12, rows, kv_head, scale, cap,
            D, BD, BN, CAPPED,
        )  # fmt: skip
    some = sums > 0.0
    tl.store(
        lse + head.to(tl.int64) * lse_head + rows,
        tl.where(some, (m + tl.log2(tl.where(some, sums, 1.0))) * LN2, float("-inf")),
        mask=rows < tl.load(strip + 1),
    )
    acc = acc / tl.where(some, sums, 1.0)[:, None]
    out_tile = out + head.to(tl.int64) * out_head + rows.to(tl.int64)[:, None] * out_row + dims[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=here)
