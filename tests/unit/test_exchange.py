"""Messages of ranks that write into each other's memory: two processes, their memory shared, the kernel interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from apb.kernels.norm import RowNorm

pytestmark = pytest.mark.triton
CAPACITY, RANKS = 8192, 2
# Numbers of consecutive messages: less than a block of words, several blocks, again fewer.
COUNTS = (6, 3000, 1030, 4, 4, 4096)
# Numbers of rows.
WIDTHS = (2048, 90, 4094)


def given(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers, whose sums nothing rounds, and what a rank without keys sends."""
    x = ((torch.arange(count) * (rank + 3)) % 61 - 30).to(dtype)
    x[rank % count] = float("-inf")
    return x


def exchanged(rank: int, memory: Tensor, results: Any) -> None:
    """One rank's part: every message summed, then gathered."""
    torch.set_num_threads(1)
    from apb.kernels import exchange

    peers = torch.tensor([each.data_ptr() for each in memory])
    counted = exchange.counters(CAPACITY, 1 << 40, torch.device("cpu"))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for count in COUNTS:
            if count * dtype.itemsize > CAPACITY:
                continue
            x = given(rank, count, dtype)
            found.append([exchange.exchange(x, peers, counted, rank, gather) for gather in (False, True)])
    rows = torch.tensor([each.data_ptr() for each in memory]) + 8 * exchange.words_of(CAPACITY, RANKS)
    counted = exchange.row_counters(1 << 40, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        for width in WIDTHS:
            row, *given_row = row_of(rank, width, dtype)
            found.append([*exchange.sum_onto(row, *given_row, rows, counted, rank)])
    results.put((rank, [[each.tolist() for each in pair] for pair in found]))


def row_of(rank: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, RowNorm]:
    """A rank's part of a row, and what both have: the row that it is added to, and the norm."""
    *parts, residual = [given(each, width, dtype).clamp(min=-30).view(1, 1, -1) for each in (*range(RANKS), 7)]
    weight = torch.linspace(-2, 2, width).to(dtype)
    return parts[rank], residual, RowNorm(weight, 0.3, offset=width % 4 == 0, rounded=width % 4 != 0)


@pytest.mark.timeout(240)
def test_sums_and_gathers() -> None:
    """Messages of several lengths after each other, of either dtype, -inf among them: torch's sums, on both ranks; and
    rows summed up onto another, with the norm.
    """
    from apb.kernels import exchange

    words = exchange.words_of(CAPACITY, RANKS) + exchange.words_of(4 * exchange.ROW_WORDS, RANKS)
    memory = torch.zeros(RANKS, words, dtype=torch.long).share_memory_()
    spawn = torch.multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    ranks = [spawn.Process(target=exchanged, args=(rank, memory, results)) for rank in range(RANKS)]
    for each in ranks:
        each.start()
    found = dict(results.get() for _ in ranks)
    for each in ranks:
        each.join()
    messages = [
        torch.stack([given(rank, count, dtype) for rank in range(RANKS)])
        for dtype in (torch.float32, torch.bfloat16)
        for count in COUNTS
        if count * dtype.itemsize <= CAPACITY
    ]
    for rank in range(RANKS):
        for (total, every), parts in zip(found[rank], messages, strict=False):
            assert total == parts.sum(0).tolist()
            assert every == parts.tolist()
    rows = [found[rank][len(messages) :] for rank in range(RANKS)]
    assert rows[0] == rows[1] and len(rows[0]) == 2 * len(WIDTHS)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        for (total, normed), width in zip(rows[0][number * len(WIDTHS) :], WIDTHS, strict=False):
            parts, residual, norm = zip(*(row_of(rank, width, dtype) for rank in range(RANKS)), strict=True)
            wanted = residual[0] + (parts[0] + parts[1])
            assert total == wanted.tolist()
            room = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(torch.tensor(normed), norm[0].of(wanted).float(), rtol=room, atol=room)


def test_what_never_comes_is_waited_for_in_vain() -> None:
    """A rank that is alone gives up after its patience, and has no sum."""
    from apb.kernels import exchange

    memory = torch.zeros(RANKS, exchange.words_of(CAPACITY, RANKS), dtype=torch.long)
    peers = torch.tensor([each.data_ptr() for each in memory])
    counted = exchange.counters(CAPACITY, 5, torch.device("cpu"))
    x = torch.arange(16.0)
    assert torch.equal(exchange.exchange(x, peers, counted, 0, False), x)
