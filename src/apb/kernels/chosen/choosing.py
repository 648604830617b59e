"""Kernels that choose keys by an index of them, in plain Triton: what units promise, their places, the chosen ones.

All sizes are read on the device, so that a CUDA graph that was captured once serves every cache: see :mod:`.`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import COLUMNS, rule

_COLUMNS = tl.constexpr(COLUMNS)
_FIRST, _LAST, _DROPPED, _DIGITS = (tl.constexpr(x) for x in (rule.FIRST, rule.LAST, rule.DROPPED, rule.DIGITS))
BINS = 1 << rule.DIGITS
_BINS = tl.constexpr(BINS)


@triton.jit
def _address(row, column: tl.constexpr, dtype: tl.constexpr):
    """The pointer in a column of a row; the compiler tracks alignment only of the pointer itself."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _number(row, column: tl.constexpr):
    return tl.load(row + column).to(tl.int32)


@triton.jit
def units_of(row):
    """Number of units of each KV head."""
    return _number(row, 5)


@triton.jit
def covered_of(row):
    """Number of keys that the units are made of."""
    return _number(row, 6)


@triton.jit
def list_of(row, H: tl.constexpr, KV: tl.constexpr):
    """Where the chosen ones are listed; see :func:`pick`."""
    return _address(row, 8, tl.int32) + (H + KV) * tl.load(row + 5)


@triton.jit
def far_of(row, dtype: tl.constexpr):
    """Pointers to keys and values in host memory, how many tokens apart heads are there, and how many tokens are."""
    return _address(row, 9, dtype), _address(row, 10, dtype), tl.load(row + 11), tl.load(row + 12)


@triton.jit
def room_of(row, CHUNKS: tl.constexpr, PAGE: tl.constexpr):
    """Entries of the list for each chunk."""
    return tl.cdiv(covered_of(row) if PAGE == 0 else units_of(row), CHUNKS)


@triton.jit(do_not_specialize=["layer", "splits"])
def promise(
    q, table, layer, sums, histograms, q_head, splits, scale,
    H: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BU: tl.constexpr, PAGE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a run of one KV head's units promises to every head of its group, and the log-sum-exp of that by head.

    Of pages it is the bound on q.k, of clusters q.k of the mean, counted as often as the cluster has keys. The
    histograms, TILES * TILE numbers, are zeroed for the kernels that follow.
    """
    split, kv_head = tl.program_id(0), tl.program_id(1)
    for tile in range(split * KV + kv_head, TILES, splits * KV):
        tl.store(histograms + tile * TILE + tl.arange(0, TILE), tl.zeros([TILE], tl.int32))
    dtype: tl.constexpr = q.dtype.element_ty
    row = table + layer * _COLUMNS
    units = units_of(row)
    run = kv_head.to(tl.int64) * tl.load(row + 2)
    first = _address(row, 0, dtype) + run * D
    second = _address(row, 1, dtype if PAGE > 0 else tl.int32) + run * (D if PAGE > 0 else 1)
    promised = _address(row, 8, tl.float32)
    dims, cols, group = tl.arange(0, BD), tl.arange(0, BU), tl.arange(0, BM)
    head = kv_head * GROUP + group
    here = (group < GROUP)[:, None] & (dims < D)[None, :]
    query = tl.load(q + head[:, None] * q_head + dims[None, :], mask=here, other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    share = tl.cdiv(tl.cdiv(units, BU), splits)
    for tile in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(units, BU))):
        unit = tile * BU + cols
        there = unit < units
        at = unit.to(tl.int64)[None, :] * D + dims[:, None]
        inside = (dims < D)[:, None] & there[None, :]
        x = tl.load(first + at, mask=inside, other=0.0)
        if PAGE:
            y = tl.load(second + at, mask=inside, other=0.0)
            s = tl.dot(tl.where(query > 0, query, 0.0).to(dtype), x, input_precision="ieee")
            s = tl.dot(tl.where(query < 0, query, 0.0).to(dtype), y, s, input_precision="ieee") * scale
            counted = tl.where(there[None, :], s, float("-inf"))
        else:
            s = tl.dot(query, x, input_precision="ieee") * scale
            size = tl.load(second + unit, mask=there, other=0)
            counted = tl.where(
                (size > 0)[None, :], s + tl.log(tl.maximum(size, 1).to(tl.float32))[None, :], -float("inf")
            )
        at = head.to(tl.int64)[:, None] * units + unit[None, :]
        tl.store(promised + at, s, mask=(group < GROUP)[:, None] & there[None, :])
        new = tl.maximum(m, tl.max(counted, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(counted - shift[:, None]), 1)
        m = new
    found = tl.where(total > 0.0, m + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(sums + split * H + head, found, mask=group < GROUP)


@triton.jit(do_not_specialize=["layer", "parts"])
def place(
    table, layer, sums, histograms, parts,
    H: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
    PAGE: tl.constexpr, COPIES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Places of a run of one KV head's units (:func:`apb.kernels.chosen.rule.places`), and the keys at each place.

    A unit's score is the largest of the group's heads, of its promise less the head's log-sum-exp, whose ``parts`` are
    in ``sums``. The histogram counts keys by the upper half of the place.
    """
    kv_head = tl.program_id(1)
    row = table + layer * _COLUMNS
    units = units_of(row)
    promised = _address(row, 8, tl.float32)
    part, group = tl.arange(0, BS), tl.arange(0, BG)
    head = kv_head * GROUP + group
    each = tl.load(
        sums + part[:, None] * H + head[None, :], mask=(part < parts)[:, None] & (group < GROUP)[None, :],
        other=float("-inf"),
    )  # fmt: skip
    top = tl.max(each, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    lse = top + tl.log(tl.maximum(tl.sum(tl.exp(each - top[None, :]), 0), 1e-30))
    for tile in range(tl.program_id(0), tl.cdiv(units, BU), tl.num_programs(0)):
        unit = tile * BU + tl.arange(0, BU)
        there = unit < units
        inside = (group < GROUP)[:, None] & there[None, :]
        x = tl.load(promised + head.to(tl.int64)[:, None] * units + unit[None, :], mask=inside, other=0.0)
        score = tl.max(tl.where(inside, x - lse[:, None], float("-inf")), 0)
        size = _sizes(row, kv_head, unit, there, PAGE)
        score = tl.where(size > 0, score, float("-inf"))
        bits = tl.maximum(0.0 - score, 0.0).to(tl.float32).to(tl.int32, bitcast=True) >> _DROPPED
        found = tl.where(score == score, tl.minimum(tl.maximum(bits - _FIRST, 0), _LAST), _LAST)
        tl.store(_places(row, kv_head, H) + unit, found, mask=there)
        counter = kv_head % COPIES if TOGETHER else kv_head
        tl.atomic_add(histograms + counter * _BINS + (found >> _DIGITS), size, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=["layer"])
def refine(
    table, layer, histograms,
    H: tl.constexpr, KV: tl.constexpr, BU: tl.constexpr, PAGE: tl.constexpr, COPIES: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Where the budget ends, by the upper half of places; keys there are counted by the lower half."""
    kv_head = tl.program_id(1)
    problem = 0 if TOGETHER else kv_head
    row = table + layer * _COLUMNS
    units = units_of(row)
    upper, _ = _fitting(histograms + problem * _BINS, _number(row, 7), COPIES)
    lower = histograms + ((COPIES if TOGETHER else KV) + (kv_head % COPIES if TOGETHER else kv_head)) * _BINS
    for tile in range(tl.program_id(0), tl.cdiv(units, BU), tl.num_programs(0)):
        unit = tile * BU + tl.arange(0, BU)
        there = unit < units
        found = tl.load(_places(row, kv_head, H) + unit, mask=there, other=0)
        size = _sizes(row, kv_head, unit, there, PAGE)
        tl.atomic_add(lower + (found & (_BINS - 1)), size, mask=there & (found >> _DIGITS == upper), sem="relaxed")


@triton.jit(do_not_specialize=["layer"])
def pick(
    table, layer, histograms, counts,
    H: tl.constexpr, KV: tl.constexpr, BT: tl.constexpr, CHUNKS: tl.constexpr, PAGE: tl.constexpr,
    COPIES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """List what is chosen in one of the CHUNKS of a KV head: pages, or keys whose cluster is chosen; count them.

    The list of a chunk begins at (kv_head * CHUNKS + chunk) * ``room_of``, in ascending order.
    """
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    problem = 0 if TOGETHER else kv_head
    counters = COPIES if TOGETHER else KV
    row = table + layer * _COLUMNS
    budget = _number(row, 7)
    upper, before = _fitting(histograms + problem * _BINS, budget, COPIES)
    lower, more = _fitting(histograms + (counters + problem) * _BINS, budget - before, COPIES)
    end = upper * _BINS + lower
    end = tl.where(before + more == 0, end + 1, end)  # at least the very best
    every = covered_of(row) if PAGE == 0 else units_of(row)
    room = room_of(row, CHUNKS, PAGE)
    listed = list_of(row, H, KV) + (kv_head * CHUNKS + chunk).to(tl.int64) * room
    stop = tl.minimum((chunk + 1) * room, every)
    taken = 0
    for start in range(chunk * room, stop, BT):
        item = start + tl.arange(0, BT)
        there = item < stop
        unit = item
        if PAGE == 0:
            labels = _address(row, 3, tl.int32) + kv_head.to(tl.int64) * tl.load(row + 4)
            unit = tl.load(labels + item, mask=there, other=0)
        take = there & (tl.load(_places(row, kv_head, H) + unit, mask=there, other=0) < end)
        to = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(listed + to, item, mask=take)
        taken += tl.sum(take.to(tl.int32), 0)
    tl.store(counts + kv_head * CHUNKS + chunk, taken)


@triton.jit
def _places(row, kv_head, H: tl.constexpr):
    """Places of one KV head's units, behind what is promised to the heads."""
    units = tl.load(row + 5)
    return _address(row, 8, tl.int32) + (H + kv_head) * units


@triton.jit
def _sizes(row, kv_head, unit, there, PAGE: tl.constexpr):
    """Keys of units; 0 where there is none."""
    if PAGE:
        return tl.where(there, PAGE, 0)
    return tl.load(_address(row, 1, tl.int32) + kv_head.to(tl.int64) * tl.load(row + 2) + unit, mask=there, other=0)


@triton.jit
def _fitting(histogram, budget, COPIES: tl.constexpr):
    """How many of the first bins of a histogram, or of the sum of some, fit into a budget together, and their sum."""
    bins = tl.load(histogram + tl.arange(0, _BINS))
    for copy in tl.static_range(1, COPIES):
        bins += tl.load(histogram + copy * _BINS + tl.arange(0, _BINS))
    total = tl.cumsum(bins, 0)
    fits = total <= budget
    return tl.sum(fits.to(tl.int32), 0), tl.max(tl.where(fits, total, 0), 0)
