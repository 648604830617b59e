"""Sums and gathers over GPUs that write into each other's memory: one launch, and one trip of the data.

Every program writes its numbers into every rank's memory, each 4 bytes beside the number of the call in one word of 8
bytes, which arrives whole; then it waits until the words of all ranks have that number. So no message says that another
one is complete. Two halves of the memory take turns: whoever writes into one of them again has had an answer since,
which was sent after the last reading. (The words are those of NCCL's protocol for low latency.)
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Words of a program.
_BLOCK = 512


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
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _exchange[(triton.cdiv(words, _BLOCK),)](
            x.view(-1).view(torch.int32), out.view(-1).view(torch.int32), peers, counted, words,
            RANK=rank, SIZE=size, CAPACITY=capacity, PROGRAMS=len(counted) - 1, BLOCK=_BLOCK, GATHER=gather,
            HALVES=halves, num_warps=4,
        )  # fmt: skip
    return out


def _whole(capacity: int) -> int:
    """Words for so many bytes, in whole blocks."""
    return triton.cdiv(capacity // 4, _BLOCK) * _BLOCK


@triton.jit(do_not_specialize=["words"])
def _exchange(
    x, out, peers, counted, words, RANK: tl.constexpr, SIZE: tl.constexpr, CAPACITY: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One block of words; ``x`` and ``out`` as int32, of which each is two numbers with ``HALVES``."""
    program = tl.program_id(0)
    number = tl.load(counted + program) + 1
    patience = tl.load(counted + PROGRAMS)
    mark = number & 0x7FFFFFFF
    half = (number & 1) * SIZE * CAPACITY
    at = program * BLOCK + tl.arange(0, BLOCK)
    there = at < words
    mine = tl.load(x + at, mask=there, other=0)
    line = (mark << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for rank in tl.static_range(SIZE):
        area = tl.load(peers + rank).to(tl.pointer_type(tl.int64)) + half + RANK * CAPACITY
        tl.store(area + at, line, mask=there)
    tl.debug_barrier()
    own = tl.load(peers + RANK).to(tl.pointer_type(tl.int64)) + half
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):
        word = own + rank * CAPACITY + at
        arrived = tl.load(word, mask=there, other=0, volatile=True)
        late = tl.sum((there & ((arrived >> 32) != mark)).to(tl.int32), 0)
        looks = tl.zeros([], tl.int64)
        while (late > 0) & (looks < patience):
            arrived = tl.load(word, mask=there, other=0, volatile=True)
            late = tl.sum((there & ((arrived >> 32) != mark)).to(tl.int32), 0)
            looks += 1
        theirs = arrived.to(tl.int32)
        if GATHER:
            tl.store(out + rank * words + at, theirs, mask=there)
        elif HALVES:
            low += (theirs << 16).to(tl.float32, bitcast=True)
            high += (theirs & -65536).to(tl.float32, bitcast=True)
        else:
            low += theirs.to(tl.float32, bitcast=True)
    if not GATHER:
        if HALVES:
            first = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            second = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
            tl.store(out + at, first | (second << 16), mask=there)
        else:
            tl.store(out + at, low.to(tl.int32, bitcast=True), mask=there)
    tl.store(counted + program, number)
