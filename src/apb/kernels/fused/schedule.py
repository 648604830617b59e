"""What the fused kernels compute, tile by tile, in which order and on which program: tables of integers.

A strip is up to ``block_m`` query rows of one task; an item is a strip and a head. A row of the table is a strip: its
first row, the row after its last, then five numbers for each of three sources: the key at which its part of the source
starts, how many tiles of ``block_n`` keys all rows see whole, how many tiles after those need a mask, the keys there
are, and the diagonal: row r of q sees key j where j < min(keys, r + diagonal + 1).
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
# Keys and values that are read at the same time should stay in a GPU's L2 cache.
_TOGETHER_BYTES = 24 << 20
# What an item costs beside its tiles, in tiles: its first product, its last one and its output overlap with nothing.
_ITEM_COST = 2


@dataclass(frozen=True)
class Part:
    """``keys`` keys of a source from ``first`` on, seen by all rows or causally, aligned at the bottom right."""

    source: int
    first: int
    keys: int
    causal: bool


@dataclass(frozen=True)
class Task:
    """Rows [start, stop) of q and what they see: at most one part of each source."""

    start: int
    stop: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Schedule:
    """Tables on the device, int32: (strips, FIELDS), (items,) as strip * heads + head, (programs + 1,) bounds in it."""

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
    """Share the items out over at most ``programs`` programs, each to the one that is free first.

    Heads that read the same keys come together, as many KV heads at a time as fit in the cache; among them the longest
    items first, so that all programs end at about the same time. ``head_bytes``: of one key of one head.
    """
    strips = [strip for task in tasks for strip in _strips(task, block_m, block_n)]
    costs = [_tiles(strip) for strip in strips]
    order = sorted(range(len(strips)), key=costs.__getitem__, reverse=True)
    keys = max((sum(part.keys for part in task.parts) for task in tasks), default=0)
    together = max(1, min(kv_heads, _TOGETHER_BYTES // max(1, 2 * head_bytes * keys)))
    group = heads // kv_heads
    items = [
        (strip, head)
        for first in range(0, heads, together * group)
        for strip in order
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
