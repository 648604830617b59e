"""Sums and gathers over GPUs that write into each other's memory: one launch, and one trip of the data.

Every program writes its numbers into every rank's memory, each 4 bytes beside the number of the call in one word of 8
bytes, which arrives whole; then it waits until the words of all ranks have that number. So no message says that another
one is complete. Two halves of the memory take turns: whoever writes into one of them again has had an answer since,
which was sent after the last reading. (The words are those of NCCL's protocol for low latency.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .few_rows import by_weight
from .launching import on_device_of
from .norm import RowNorm

# Words of a program; and of the one program that has a whole row, at most.
_BLOCK, ROW_WORDS = 512, 4096
_ROW_WARPS = 8  # of 4 to 32, all take 4.2 to 4.8 us for 4,096 numbers between two H200s


def words_of(capacity: int, size: int) -> int:
    """int64 words of the memory of one of ``size`` ranks, for messages of ``capacity`` bytes at most."""
    return 2 * size * _whole(capacity)


def counters(capacity: int, patience: int, device: torch.device) -> Tensor:
    """The number of each program's last call, and at the end how often a program looks for words before it gives up."""
    found = torch.zeros(_whole(capacity) // _BLOCK + 1, dtype=torch.long, device=device)
    found[-1] = patience
    return found


def exchange(x: Tensor, peers: Tensor, counted: Tensor, rank: int, gather: bool) -> Tensor:
    """The sum of all ranks' ``x``, to the bit the same on each, or all of them; every rank calls it, in the same order.

    Args:
        x: contiguous, fp32 or bf16, a multiple of 4 bytes, of the same shape on every rank.
        peers: (ranks,) int64 on x's device: addresses of each rank's memory, :func:`words_of` words which were zero
            before the first call.
        counted: :func:`counters` for the same capacity.
        rank: this one.
        gather: all of them, not the sum.

    Returns:
        x's shape, or (ranks, *x.shape), in x's dtype. If words of a rank never came before the patience ended, they
        are wrong.
    """
    size, halves = len(peers), x.dtype == torch.bfloat16
    capacity = (len(counted) - 1) * _BLOCK
    words = x.numel() * x.element_size() // 4
    assert words <= capacity, "more than there is memory for"
    if x.data_ptr() % 4:  # in the middle of a word
        x = x.clone()
    out = x.new_empty(size, *x.shape) if gather else torch.empty_like(x)
    with on_device_of(x):
        _exchange[(triton.cdiv(words, _BLOCK),)](
            x, out, peers, counted, words, RANK=rank, SIZE=size, CAPACITY=capacity, PROGRAMS=len(counted) - 1,
            BLOCK=_BLOCK, GATHER=gather, HALVES=halves, num_warps=4,
        )  # fmt: skip
    return out


def sum_onto(
    x: Tensor, residual: Tensor, norm: RowNorm, peers: Tensor, counted: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The sum of all ranks' ``x``, rounded, and of a row that all of them have; and that row normed.

    Args:
        x: a row, contiguous, as of :func:`exchange`, of :data:`ROW_WORDS` words at most.
        residual: of x's shape and dtype, contiguous, the same on every rank.
        norm: as wide as x, of the sum.
        peers: as in :func:`exchange`: of other memory, for messages of :data:`ROW_WORDS` words.
        counted: :func:`row_counters`.
        rank: this one.

    Returns:
        the sum and the normed sum, of x's shape and dtype.
    """
    halves = x.dtype == torch.bfloat16
    words = x.numel() * x.element_size() // 4
    assert words <= ROW_WORDS, "more than there is memory for"
    x, residual, weight = (each.clone() if each.data_ptr() % 4 else each for each in (x, residual, norm.weight))
    total, normed = torch.empty_like(x), torch.empty_like(x)
    with on_device_of(x):
        _sum_onto[(1,)](
            x, residual, weight, total, normed, peers, counted, norm.eps, W=x.numel(), WORDS=words, RANK=rank,
            SIZE=len(peers), CAPACITY=ROW_WORDS, BLOCK=triton.next_power_of_2(words), HALVES=halves,
            OFFSET=norm.offset, ROUNDED=norm.rounded, num_warps=_ROW_WARPS,
        )  # fmt: skip
    return total, normed


def row_counters(patience: int, device: torch.device) -> Tensor:
    """As :func:`counters`, of one program."""
    return torch.tensor([0, patience], device=device)


def _whole(capacity: int) -> int:
    """Words for so many bytes, in whole blocks."""
    return triton.cdiv(capacity // 4, _BLOCK) * _BLOCK


@triton.jit(do_not_specialize=["words"])
def _exchange(
    x, out, peers, counted, words, RANK: tl.constexpr, SIZE: tl.constexpr, CAPACITY: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One block of words, of which each is two numbers with ``HALVES``."""
    x, out = _words(x), _words(out)
    program = tl.program_id(0)
    number = tl.load(counted + program) + 1
    patience = tl.load(counted + PROGRAMS)
    at = program * BLOCK + tl.arange(0, BLOCK)
    there = at < words
    _send(tl.load(x + at, mask=there, other=0), peers, at, there, number, RANK, SIZE, CAPACITY)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):
        theirs = _sent(rank, peers, at, there, number, patience, RANK, SIZE, CAPACITY)
        if GATHER:
            tl.store(out + rank * words + at, theirs, mask=there)
        else:
            one, other = _numbers(theirs, HALVES)
            low += one
            high += other
    if not GATHER:
        tl.store(out + at, _word(low, high, HALVES), mask=there)
    tl.store(counted + program, number)


@triton.jit
def _sum_onto(
    x, residual, weight, total, normed, peers, counted, eps, W: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr,
    SIZE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """A whole row of W numbers in one program."""
    x, residual, weight, total, normed = _words(x), _words(residual), _words(weight), _words(total), _words(normed)
    number = tl.load(counted) + 1
    patience = tl.load(counted + 1)
    at = tl.arange(0, BLOCK)
    there = at < WORDS
    _send(tl.load(x + at, mask=there, other=0), peers, at, there, number, RANK, SIZE, CAPACITY)
    # Loaded while the others' words are on their way.
    low_before, high_before = _numbers(tl.load(residual + at, mask=there, other=0), HALVES)
    low_weight, high_weight = _numbers(tl.load(weight + at, mask=there, other=0), HALVES)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):
        one, other = _numbers(_sent(rank, peers, at, there, number, patience, RANK, SIZE, CAPACITY), HALVES)
        low += one
        high += other
    dtype: tl.constexpr = tl.bfloat16 if HALVES else tl.float32
    low = (low.to(dtype).to(tl.float32) + low_before).to(dtype).to(tl.float32)
    high = (high.to(dtype).to(tl.float32) + high_before).to(dtype).to(tl.float32)
    tl.store(total + at, _word(low, high, HALVES), mask=there)
    factor = tl.rsqrt(tl.sum(low * low + high * high, 0) / W + eps)
    low = by_weight(low * factor, low_weight, OFFSET, ROUNDED, dtype).to(tl.float32)
    high = by_weight(high * factor, high_weight, OFFSET, ROUNDED, dtype).to(tl.float32)
    tl.store(normed + at, _word(low, high, HALVES), mask=there)
    tl.store(counted, number)


@triton.jit
def _words(x):
    """Numbers as words, of which each is two of 16 bits."""
    return x.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _send(mine, peers, at, there, number, RANK: tl.constexpr, SIZE: tl.constexpr, CAPACITY: tl.constexpr):
    """Write words into every rank's memory, each beside the number of the call."""
    half = (number & 1) * SIZE * CAPACITY
    line = ((number & 0x7FFFFFFF) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for rank in tl.static_range(SIZE):
        area = tl.load(peers + rank).to(tl.pointer_type(tl.int64)) + half + RANK * CAPACITY
        tl.store(area + at, line, mask=there)
    tl.debug_barrier()


@triton.jit
def _sent(
    rank, peers, at, there, number, patience, RANK: tl.constexpr, SIZE: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """A rank's words, as soon as all have arrived in this one's memory."""
    mark = number & 0x7FFFFFFF
    half = (number & 1) * SIZE * CAPACITY
    word = tl.load(peers + RANK).to(tl.pointer_type(tl.int64)) + half + rank * CAPACITY + at
    arrived = tl.load(word, mask=there, other=0, volatile=True)
    late = tl.sum((there & ((arrived >> 32) != mark)).to(tl.int32), 0)
    looks = tl.zeros([], tl.int64)
    while (late > 0) & (looks < patience):
        arrived = tl.load(word, mask=there, other=0, volatile=True)
        late = tl.sum((there & ((arrived >> 32) != mark)).to(tl.int32), 0)
        looks += 1
    return arrived.to(tl.int32)


@triton.jit
def _numbers(words, HALVES: tl.constexpr):
    """The numbers in words, in fp32: two, with ``HALVES``, or one and zero."""
    low = (words << 16 if HALVES else words).to(tl.float32, bitcast=True)
    high = (words & (-65536 if HALVES else 0)).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _word(low, high, HALVES: tl.constexpr):
    """Words of such numbers, rounded."""
    words = low.to(tl.int32, bitcast=True)
    if HALVES:
        first = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = first | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words
