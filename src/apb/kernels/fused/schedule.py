"""The fused kernels' schedule: integer tables of the tiles, their order and the program that computes each.

A strip is up to ``block_m`` query rows of one task; an item is a strip and a head. A row of the table is a strip: its
first row, the row after its last, then five numbers for each of three sources: the first key of its part of the
source, the number of tiles of ``block_n`` keys that need no mask, the number of tiles after those that need one, the
number of keys, and the diagonal: row r of q sees key j if j < min(keys, r + diagonal + 1).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SOURCES = 3
FIELDS = 20
_NO_DIAGONAL = 1 << 30
# Keys and values read at the same time should fit in a GPU's L2 cache.
_TOGETHER_BYTES = 24 << 20
# Fixed cost of an item, in tiles: its first product, its last product and its output overlap with nothing.
_ITEM_COST = 2


@dataclass(frozen=True)
class Part:
    """``keys`` keys of a source from ``first`` on, seen by all rows or causally with bottom-right alignment."""

    source: int
    first: int
    keys: int
    causal: bool


@dataclass(frozen=True)
class Task:
    """Rows [start, stop) of q and the parts they see, at most one of each source."""

    start: int
    stop: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Schedule:
    """int32 tables on the device.

    Attributes:
        table: (strips, FIELDS).
        items: (items,), each strip * heads + head, grouped by program.
        bounds: (programs + 1,), program p computes items [bounds[p], bounds[p + 1]).
    """

    table: Tensor
    items: Tensor
    bounds: Tensor


@lru_cache(maxsize=64)
def schedule(
    tasks: tuple[Task, ...],
    heads: int,
    kv_heads: int,
    head_bytes: int,
    block_m: int,
    block_n: int,
    programs: int,
    device: torch.device,
) -> Schedule:
    """Distribute the items over at most ``programs`` programs, each item to the program that is free first.

    Heads that read the same keys run together, as many KV heads at a time as fit in the L2 cache, and within them task
    by task. The longest items of a task come first, so that all programs finish at about the same time.
    ``head_bytes`` is the size of one key of one head.
    """
    runs = [
        sorted(_strips(task, block_m, block_n), key=_tiles, reverse=True) for task in tasks if task.stop > task.start
    ]
    runs.sort(key=lambda run: _tiles(run[0]), reverse=True)
    strips = [strip for run in runs for strip in run]
    costs = [_tiles(strip) for strip in strips]
    keys = max((sum(part.keys for part in task.parts) for task in tasks), default=0)
    together = max(1, min(kv_heads, _TOGETHER_BYTES // max(1, 2 * head_bytes * keys)))
    group = heads // kv_heads
    items = [
        (strip, head)
        for first in range(0, heads, together * group)
        for strip in range(len(strips))
        for head in range(first, min(first + together * group, heads))
    ]
    free = [(0, program) for program in range(min(programs, len(items)))]
    shares: list[list[int]] = [[] for _ in free]
    for strip, head in items:
        busy, program = heapq.heappop(free)
        shares[program].append(strip * heads + head)
        heapq.heappush(free, (busy + costs[strip] + _ITEM_COST, program))
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + len(share))
    flat = [item for share in shares for item in share]
    return Schedule(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (strips, flat, bounds)))


def _strips(task: Task, block_m: int, block_n: int) -> list[list[int]]:
    strips = []
    for start in range(task.start, task.stop, block_m):
        stop = min(start + block_m, task.stop)
        strip = [0] * FIELDS
        strip[:2] = start, stop
        for part in task.parts:
            diagonal = part.keys - task.stop if part.causal else _NO_DIAGONAL
            whole = max(min(part.keys, start + diagonal + 1), 0) // block_n
            tiles = -(-max(min(part.keys, stop + diagonal), 0) // block_n)
            base = 2 + 5 * part.source
            strip[base : base + 5] = part.first, whole, tiles - whole, part.keys, diagonal
        strips.append(strip)
    return strips


def _tiles(strip: list[int]) -> int:
    return sum(strip[2 + 5 * source + 1] + strip[2 + 5 * source + 2] for source in range(SOURCES))
