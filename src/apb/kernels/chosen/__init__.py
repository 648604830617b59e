"""Attention of one row over keys that an index chooses, in six launches that read all sizes on the device.

So a CUDA graph that was captured once serves every cache and its index, whose addresses and sizes are in tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..launching import on_device_of
from .rule import places, within

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHUNKS", "COLUMNS", "Index", "attention", "places", "row", "scratch_size", "within"]

CHUNKS = 64
"""Parts of a KV head's keys in which chosen ones are listed, and counted, apart."""

COLUMNS = 13
"""Numbers in a row of the table of indexes."""

# Units, or keys, that a program handles at a time where it works number by number.
_TILE = 1024
# Of keys whose cluster must be looked up there are many more than units: more are on their way at a time.
_KEYS_TILE, _KEYS_WARPS = 2048, 8
# KV heads that share a budget count into so many histograms, whose sums count: in one they wait for each other.
_COPIES = 4
_STAGES = 3
# One more for what is loaded from the list, and one for the wait between: as many keys are on their way as in decode.
_LISTED_STAGES = 5


@dataclass(frozen=True)
class Index:
    """One layer's index, as the kernels read it. Head by head, tensors are contiguous.

    Attributes:
        first: (kv_heads, units, head_dim) of the dtype of queries: the largest keys of pages, by channel, or the means
            of clusters.
        second: of pages the least keys, (kv_heads, units, head_dim) of that dtype; of clusters the number of their
            keys, (kv_heads, units) int32. Its heads are as many units apart as the first's.
        labels: (kv_heads, keys) int32, the cluster of every key; None for pages, which are consecutive keys.
        covered: keys that it is of; the others are attended to in any case.
    """

    first: Tensor
    second: Tensor
    labels: Tensor | None
    covered: int


def row(index: Index | None, budget: int, scratch: Tensor, far: tuple[Tensor, Tensor] | None = None) -> list[int]:
    """A layer's row of the table for :func:`attention`: COLUMNS int64.

    Args:
        index: None if there is none, and all keys are attended to.
        budget: keys that may be chosen, at least 0: of each KV head, or of all together.
        scratch: :func:`scratch_size` int32, which all layers may share.
        far: keys and values (tokens, kv_heads, head_dim) of the first tokens, if they are not in the storages but in
            pinned host memory, which kernels read in place. Head by head, they are contiguous.
    """
    away = [0] * 4
    if far is not None:
        k, v = far
        assert k.stride() == v.stride() and k.stride()[::2] == (k.shape[2], 1)
        away = [k.data_ptr(), v.data_ptr(), k.stride(1) // k.shape[2], len(k)]
        assert all(address % 16 == 0 for address in away[:2])
    if index is None:
        return [*[0] * 8, scratch.data_ptr(), *away]
    units, apart = index.first.shape[1], index.first.stride(0) // index.first.shape[2]
    assert index.second.stride(0) == (apart if index.second.dim() == 2 else index.first.stride(0))
    labels = (0, 0) if index.labels is None else (index.labels.data_ptr(), index.labels.stride(0))
    at = [index.first.data_ptr(), index.second.data_ptr(), apart, *labels]
    assert all(address % 16 == 0 for address in (at[0], at[1], at[3], scratch.data_ptr()))
    return [*at, units, index.covered, budget, scratch.data_ptr(), *away]


def scratch_size(heads: int, index: Index | None) -> int:
    """Numbers of 32 bits that a layer needs meanwhile: promises, places, and the list, of pages or else of keys."""
    if index is None:
        return 0
    kv_heads, units, _ = index.first.shape
    entries = units if index.labels is None else index.covered
    return (heads + kv_heads) * units + kv_heads * CHUNKS * -(-entries // CHUNKS)


def attention(
    q: Tensor,
    storages: Tensor,
    table: Tensor,
    counts: Tensor,
    layer: int,
    kv_heads: int,
    scale: float,
    length: Tensor,
    *,
    page_size: int | None,
    together: bool,
    far: bool = False,
    partial: bool = False,
) -> tuple[Tensor, Tensor]:
    """A single row over those of the first ``length`` keys of a layer that its index chooses or does not cover.

    Units are chosen by :func:`within`, by scores as of :meth:`apb.decoding.selecting.KeyIndex.scores`.

    Args:
        q: (1, heads, head_dim), bf16, fp16 or fp32, any strides.
        storages, layer, scale, length: as in :func:`apb.kernels.decode.cached_attention`.
        table: (layers, COLUMNS) int64 on the device, rows of :func:`row`.
        counts: (kv_heads, CHUNKS) int32, which becomes the number of chosen pages, or else keys.
        kv_heads: heads of the keys and values.
        page_size: keys of a page; None if the index is of clusters.
        together: KV heads share one budget.
        far: the table says which of the first keys are in host memory; a storage's addresses are then where its first
            key would be if they were there.
        partial: as in :func:`apb.kernels.decode.attention`.

    Returns:
        As :func:`apb.attention`.
    """
    from ..merging import padded
    from . import attending, choosing

    q = q if q.stride(2) == 1 else q.contiguous()
    heads, head_dim = q.shape[1:]
    group = heads // kv_heads
    width = padded(head_dim)
    processors = _processors(q.device)
    # As many programs as fit at a time, so that all end together; for each KV head at least one.
    splits = max(2 * processors // kv_heads, 1)
    programs = max(2 * processors, 2 * kv_heads)
    copies = min(_COPIES, kv_heads) if together else 1
    counters = copies if together else kv_heads
    tiles, tile = 2 * counters * choosing.BINS // _TILE, _TILE
    wide = width * q.element_size() > 256
    sizes = {"H": heads, "KV": kv_heads}
    row = {"GROUP": group, "D": head_dim, "BD": width, "BM": max(16, 1 << (group - 1).bit_length())}
    kind = {"PAGE": page_size or 0}
    choice = {**kind, "COPIES": copies, "TOGETHER": together}
    sums = q.new_empty(splits, heads, dtype=torch.float32)
    histograms = q.new_empty(2, counters, choosing.BINS, dtype=torch.int32)
    spans = q.new_empty(2, kv_heads, dtype=torch.int32)
    parts = q.new_empty(programs, group, head_dim, dtype=torch.float32)
    lses = q.new_empty(programs, group, dtype=torch.float32)
    if partial:
        message = q.new_empty(1, heads, head_dim + 1, dtype=torch.float32)
        out, lse = message[..., :-1], message[..., -1].T
    else:
        out, lse = q.new_empty(1, heads, head_dim), q.new_empty(heads, 1, dtype=torch.float32)
    with on_device_of(q):
        choosing.promise[(splits, kv_heads)](
            q, table, layer, sums, histograms, q.stride(1), splits, scale, **sizes, **row, **kind,
            BU=32 if page_size or wide else 64, TILES=tiles, TILE=tile, num_warps=4, num_stages=_STAGES,
        )  # fmt: skip
        choosing.place[(splits, kv_heads)](
            table, layer, sums, histograms, splits, **sizes, **choice, GROUP=group, BU=_TILE,
            BG=1 << (group - 1).bit_length(), BS=max(2, 1 << (splits - 1).bit_length()), num_warps=4,
        )  # fmt: skip
        choosing.refine[(splits, kv_heads)](table, layer, histograms, **sizes, **choice, BU=_TILE, num_warps=4)
        choosing.pick[(CHUNKS, kv_heads)](
            table, layer, histograms, counts, **sizes, **choice, BT=_TILE if page_size else _KEYS_TILE, CHUNKS=CHUNKS,
            num_warps=4 if page_size else _KEYS_WARPS,
        )  # fmt: skip
        attending.attend[(programs,)](
            q, storages, table, layer, counts, spans, parts, lses, length, q.stride(1), programs,
            scale / math.log(2), **sizes, **row, **kind, BN=32 if wide else 64,
            BK=max(2, 1 << (kv_heads - 1).bit_length()), CHUNKS=CHUNKS, FAR=far, num_warps=4, num_stages=_LISTED_STAGES,
        )  # fmt: skip
        attending.merge[(heads,)](
            parts, lses, spans, out, lse, out.stride(1), lse.stride(0), KV=kv_heads, GROUP=group, D=head_dim, BD=width,
            BS=16, num_warps=4,
        )  # fmt: skip
    return out, lse


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
