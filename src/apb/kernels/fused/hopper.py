"""The fused kernel for Hopper (sm_90), in Triton's Gluon: one producer warp, two or three consumer warpgroups.

The producer loads query tiles and key/value tiles with TMA; every consumer owns 64 query rows. A consumer issues QK of
a tile and PV of the tile before it, and computes the softmax of the former while the latter runs (FlashAttention 3,
arXiv 2407.08608); with ``PING_PONG`` consumers also take turns at issuing their products. The accumulator is rescaled
one step late, while QK runs, and only if a row maximum has grown. :mod:`.schedule` defines the tiles and their order;
a consumer only knows how many of them need a mask. :mod:`.registers` holds the arithmetic in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .registers import capped, in_fours, pack, rescaled, row_sums, softmax, unpack

# Triton 3.9 has only the first of these two names, Triton 3.6 only the second.
_fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
LN2 = gl.constexpr(0.6931471805599453)
FIELDS = gl.constexpr(20)  # as in schedule.py


@gluon.jit
def _slot(count, STAGES: gl.constexpr):
    """Buffer of tile ``count``, and the parity of its pass through the buffers."""
    if STAGES == 4:
        return count & 3, (count >> 2) & 1
    elif STAGES == 2:
        return count & 1, (count >> 1) & 1
    else:
        return count % STAGES, (count // STAGES) & 1


@gluon.jit
def _send(k_desc, v_desc, head, row, tiles, count, bars, bufs, BN: gl.constexpr, STAGES: gl.constexpr):
    """Load ``tiles`` tiles of one source, after ``count`` earlier tiles; returns the new count."""
    k_full, k_free, v_full, v_free = bars
    k_bufs, v_bufs = bufs
    for tile in range(tiles):
        stage, phase = _slot(count, STAGES)
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        _fetch(k_desc, [head, row + tile * BN, 0], k_full.index(stage), k_bufs.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        _fetch(v_desc, [head, row + tile * BN, 0], v_full.index(stage), v_bufs.index(stage))
        count += 1
    return count


@gluon.jit
def _produce(
    descs, work, storage,
    H: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the tiles of this program's items, item by item: query tiles, masked tiles, then unmasked tiles."""
    q_desc, k0, v0, k1, v1, k2, v2 = descs
    table, items, first, last = work
    q_bars, bars, _, q_bufs, bufs = storage
    q_full, q_free = q_bars
    count = 0
    for index in range(first, last):
        item = gl.load(items + index)
        head = item % H
        kv_head = head // GROUP
        strip = table + item // H * FIELDS
        row = gl.load(strip)
        for g in gl.static_range(GROUPS):
            mbarrier.wait(q_free.index(g), ((index - first) & 1) ^ 1)
            mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
            _fetch(q_desc, [head, row + g * 64, 0], q_full.index(g), q_bufs.index(g))
        start0, full0, masked0 = gl.load(strip + 2), gl.load(strip + 3), gl.load(strip + 4)
        start1, full1, masked1 = gl.load(strip + 7), gl.load(strip + 8), gl.load(strip + 9)
        start2, full2, masked2 = gl.load(strip + 12), gl.load(strip + 13), gl.load(strip + 14)
        count = _send(k0, v0, kv_head, start0 + full0 * BN, masked0, count, bars, bufs, BN, STAGES)
        count = _send(k1, v1, kv_head, start1 + full1 * BN, masked1, count, bars, bufs, BN, STAGES)
        count = _send(k2, v2, kv_head, start2 + full2 * BN, masked2, count, bars, bufs, BN, STAGES)
        count = _send(k0, v0, kv_head, start0, full0, count, bars, bufs, BN, STAGES)
        count = _send(k1, v1, kv_head, start1, full1, count, bars, bufs, BN, STAGES)
        count = _send(k2, v2, kv_head, start2, full2, count, bars, bufs, BN, STAGES)


@gluon.jit
def _mask(s, strip, index, masked, rows, cols, BN: gl.constexpr):
    """Mask the logits of tile ``index``; tiles from ``masked`` on are left unmasked."""
    full0, masked0, keys0, diag0 = gl.load(strip + 3), gl.load(strip + 4), gl.load(strip + 5), gl.load(strip + 6)
    full1, masked1, keys1, diag1 = gl.load(strip + 8), gl.load(strip + 9), gl.load(strip + 10), gl.load(strip + 11)
    full2, keys2, diag2 = gl.load(strip + 13), gl.load(strip + 15), gl.load(strip + 16)
    key = (full2 + index - masked0 - masked1) * BN
    keys = keys2
    diag = diag2
    if index < masked0 + masked1:
        key = (full1 + index - masked0) * BN
        keys = keys1
        diag = diag1
    if index < masked0:
        key = (full0 + index) * BN
        keys = keys0
        diag = diag0
    if index >= masked:
        key = 0
        keys = BN
        diag = BN
    seen = gl.minimum(keys - key, rows + (diag + 1 - key))
    return gl.where(cols[None, :] < seen[:, None], s, float("-inf"))


@gluon.jit
def _scores(q, k_bufs, stage, M: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    k = k_bufs.index(stage).reshape([BN, D]).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([M, BN], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def _step(
    g: gl.constexpr, acc, m, sums, pairs, alpha, count, turn, tile, tiles, masked, strip, rows, scale, cap,
    bars, turns, q, bufs, D: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    PING_PONG: gl.constexpr, CAPPED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """QK of ``tile`` and PV of the tile before it; the softmax of ``tile`` runs while PV is computed."""
    M: gl.constexpr = 64
    dtype: gl.constexpr = bufs[0].dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    sum_rows: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    k_full, k_free, v_full, v_free = bars
    k_bufs, v_bufs = bufs
    before, phase = _slot(count, STAGES)
    stage, _ = _slot(count + 1, STAGES)
    after, after_phase = _slot(count + 2, STAGES)
    if PING_PONG:
        mbarrier.wait(turns.index(g), turn & 1)
    token = _scores(q, k_bufs, stage, M, D, BN, s_layout)
    acc = rescaled(acc, alpha)  # by the previous step's factor: here the tensor cores are busy with QK
    mbarrier.wait(v_full.index(before), phase)
    operand = gl.convert_layout(unpack(pairs, M, BN, dtype), gl.DotOperandLayout(0, o_layout, 2))
    o_token = warpgroup_mma(operand, v_bufs.index(before).reshape([BN, D]), acc, is_async=True)
    if PING_PONG:
        mbarrier.arrive(turns.index((g + 1) % GROUPS), count=1)
    s = warpgroup_mma_wait(1, deps=[token])
    mbarrier.arrive(k_free.index(stage), count=1)
    s = capped(s, cap, CAPPED)
    if MASKED:
        s = _mask(s, strip, tile, masked, rows, gl.arange(0, BN, gl.SliceLayout(0, s_layout)), BN)
    p, m, alpha = softmax(s, m, scale, M, BN, MASKED)
    sums = sums * gl.convert_layout(alpha, sum_rows)[:, None] + row_sums(p, M, BN)
    # Wait for the next step's keys here rather than there: the branch in the wait keeps the assembler from moving the
    # softmax behind the wait for PV, where it would overlap with nothing.
    mbarrier.wait(k_full.index(after), after_phase, pred=tile + 1 < tiles)
    acc = warpgroup_mma_wait(0, deps=[o_token])
    mbarrier.arrive(v_free.index(before), count=1)
    pairs = pack(p, M, BN, dtype)  # only now: until here PV reads the registers of the previous pairs
    return acc, m, sums, pairs, alpha, count + 1, turn + 1


@gluon.jit
def _write(acc, row_lse, target, head, row, end, M: gl.constexpr, D: gl.constexpr, dtype: gl.constexpr):
    """Store the rows before ``end`` of 64 rows of one head, 16 bytes at a time if the strides of ``out`` allow it.

    Addresses are computed here because the loops need all registers.
    """
    out, lse, out_row, out_head, lse_head = target
    rows = row + gl.arange(0, M, row_lse.type.layout)
    gl.store(lse + head.to(gl.int64) * lse_head + rows, row_lse, mask=rows < end)
    values = unpack(gl.convert_layout(pack(acc, M, D, dtype), in_fours(D)), M, D, dtype)
    rows = row + gl.arange(0, M, gl.SliceLayout(1, values.type.layout))
    cols = gl.arange(0, D, gl.SliceLayout(0, values.type.layout))
    pointers = out + head.to(gl.int64) * out_head + rows.to(gl.int64)[:, None] * out_row + cols[None, :]
    gl.store(pointers, values, mask=(rows < end)[:, None])


@gluon.jit
def _consume(
    g: gl.constexpr, factors, target, work, storage,
    H: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    PING_PONG: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Consumer ``g``: 64 rows of the strip of each of this program's items."""
    M: gl.constexpr = 64
    table, items, first, last = work
    scale, cap = factors
    q_bars, bars, turns, q_bufs, bufs = storage
    q_full, q_free = q_bars
    k_full, k_free, v_full, v_free = bars
    k_bufs, v_bufs = bufs
    dtype: gl.constexpr = q_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = q_bufs.index(g).reshape([M, D])
    count = 0
    turn = 0
    if PING_PONG:
        if g == GROUPS - 1:
            mbarrier.arrive(turns.index(0), count=1)
    for index in range(first, last):
        item = gl.load(items + index)
        head = item % H
        strip = table + item // H * FIELDS
        row = gl.load(strip) + g * M
        masked = gl.load(strip + 4) + gl.load(strip + 9) + gl.load(strip + 14)
        tiles = masked + gl.load(strip + 3) + gl.load(strip + 8) + gl.load(strip + 13)
        rows = row + gl.arange(0, M, s_rows)
        mbarrier.wait(q_full.index(g), (index - first) & 1)
        if tiles == 0:
            mbarrier.arrive(q_free.index(g), count=1)
            nothing = gl.full([M], float("-inf"), gl.float32, s_rows)
            _write(gl.zeros([M, D], gl.float32, o_layout), nothing, target, head, row, gl.load(strip + 1), M, D, dtype)
        else:
            stage, phase = _slot(count, STAGES)
            mbarrier.wait(k_full.index(stage), phase)
            token = _scores(q, k_bufs, stage, M, D, BN, s_layout)
            s = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(k_free.index(stage), count=1)
            cols = gl.arange(0, BN, gl.SliceLayout(0, s_layout))
            s = _mask(capped(s, cap, CAPPED), strip, 0, masked, rows, cols, BN)
            p, m, alpha = softmax(s, gl.full([M], float("-inf"), gl.float32, s_rows), scale, M, BN, True)
            sums = row_sums(p, M, BN)
            pairs = pack(p, M, BN, dtype)
            acc = gl.zeros([M, D], gl.float32, o_layout)
            stage, phase = _slot(count + 1, STAGES)
            mbarrier.wait(k_full.index(stage), phase, pred=tiles > 1)
            alpha = gl.full([M], 1.0, gl.float32, s_rows)
            for tile in range(1, masked):
                acc, m, sums, pairs, alpha, count, turn = _step(
                    g, acc, m, sums, pairs, alpha, count, turn, tile, tiles, masked, strip, rows, scale, cap,
                    bars, turns, q, bufs, D, BN, GROUPS, STAGES, PING_PONG, CAPPED, True,
                )  # fmt: skip
            for tile in range(gl.maximum(masked, 1), tiles):
                acc, m, sums, pairs, alpha, count, turn = _step(
                    g, acc, m, sums, pairs, alpha, count, turn, tile, tiles, masked, strip, rows, scale, cap,
                    bars, turns, q, bufs, D, BN, GROUPS, STAGES, PING_PONG, CAPPED, False,
                )  # fmt: skip
            mbarrier.arrive(q_free.index(g), count=1)
            acc = rescaled(acc, alpha)
            stage, phase = _slot(count, STAGES)
            mbarrier.wait(v_full.index(stage), phase)
            p = gl.convert_layout(unpack(pairs, M, BN, dtype), gl.DotOperandLayout(0, o_layout, 2))
            token = warpgroup_mma(p, v_bufs.index(stage).reshape([BN, D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(v_free.index(stage), count=1)
            count += 1
            total = gl.convert_layout(gl.sum(sums, 1), s_rows)
            end = gl.load(strip + 1)
            row_lse = (m + gl.log2(total)) * LN2
            total = gl.where(total == 0.0, 1.0, total)
            acc = acc * gl.convert_layout(1.0 / total, o_rows)[:, None]
            _write(acc, row_lse, target, head, row, end, M, D, dtype)


@gluon.jit(do_not_specialize=["lse_head"])
def forward(
    q, k0, v0, k1, v1, k2, v2, out, lse, out_row, out_head, lse_head, scale, cap, table, items, bounds,
    H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr, CAPPED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Kernel of :func:`apb.kernels.fused.launch`: a program computes its items, delimited by ``bounds``, in order."""
    q_bufs = gl.allocate_shared_memory(q.dtype, [GROUPS, 1, 64, D], q.layout)
    k_bufs = gl.allocate_shared_memory(q.dtype, [STAGES, 1, BN, D], k0.layout)
    v_bufs = gl.allocate_shared_memory(q.dtype, [STAGES, 1, BN, D], k0.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    # Allocated only if used: Triton reuses the memory of unused barriers, and data stored over a barrier that was not
    # invalidated is lost when the GPU switches to another process.
    turns = q_free
    if PING_PONG:
        turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(GROUPS):
            mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()
    descs = (q, k0, v0, k1, v1, k2, v2)
    target = (out, lse, out_row, out_head, lse_head)
    work = (table, items, gl.load(bounds + gl.program_id(0)), gl.load(bounds + gl.program_id(0) + 1))
    factors = (scale, cap)
    storage = ((q_full, q_free), (k_full, k_free, v_full, v_free), turns, q_bufs, (k_bufs, v_bufs))
    # fmt: off
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (0, factors, target, work, storage, H, D, BN, GROUPS, STAGES, PING_PONG, CAPPED)),
            (_consume, (1, factors, target, work, storage, H, D, BN, GROUPS, STAGES, PING_PONG, CAPPED)),
            (_produce, (descs, work, storage, H, GROUP, BN, GROUPS, STAGES)),
        ], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_consume, (0, factors, target, work, storage, H, D, BN, GROUPS, STAGES, PING_PONG, CAPPED)),
            (_consume, (1, factors, target, work, storage, H, D, BN, GROUPS, STAGES, PING_PONG, CAPPED)),
            (_consume, (2, factors, target, work, storage, H, D, BN, GROUPS, STAGES, PING_PONG, CAPPED)),
            (_produce, (descs, work, storage, H, GROUP, BN, GROUPS, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])
    # fmt: on
