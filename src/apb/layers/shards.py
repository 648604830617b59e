"""Attention of rows that every rank holds over keys and values sharded over the ranks.

Used for the query's rows in prefill and every new token in decode: each rank computes a partial result over its shard,
and the partial results are merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..distributed.collectives import Group, Pending
from ..kernels.attention import Segment, attention
from ..kernels.merge import merge_packed, pack
from ..kernels.window import Run, chunked_attention, window_attention
from ..planning.halo import first_seen
from ..timing import timed
from .base import AttentionInput


@dataclass(frozen=True)
class StoredShard:
    """Shards of one or several sessions as described in device memory, so that a captured step serves any caches.

    Attributes:
        table: (layers, sessions, 3) int64: addresses of a layer's keys and values, and their capacity; see
            :func:`apb.kernels.decode.cached_attention`.
        length: (sessions,) int32: the number of keys in the layer that is attended.
        several: True if the result is to be merged with those of other ranks.
    """

    table: Tensor
    length: Tensor
    several: bool


@dataclass(frozen=True)
class NewRows:
    """Positions of the rows of a pass, and of the keys in this rank's shard.

    Attributes:
        first: true position of the first of the rows, which are consecutive.
        positions: true positions of the keys in the layer's k and v, one range after the other; the rank whose last
            range ends where the rows do holds the rows' own keys, which they see causally.
        earlier: the same of ``layer.earlier``.
    """

    first: int
    positions: Sequence[range]
    earlier: Sequence[range] = ()

    def holds_own(self, rows: int) -> bool:
        """True if the shard ends with the keys of the rows themselves."""
        return bool(self.positions) and self.positions[-1].stop == self.first + rows


@dataclass
class Merging:
    """Rows whose partial results are on their way from all ranks; :meth:`wait` merges them."""

    layer: AttentionInput
    partial: Pending | tuple[Tensor, Tensor]

    def wait(self) -> Tensor:
        """The merged output (rows, heads, head_dim) in q's dtype, the same on every rank."""
        return self.layer.settle(*self.merged).to(self.layer.q.dtype)

    @cached_property
    def merged(self) -> tuple[Tensor, Tensor]:
        """The merged output without sinks, and its lse (heads, rows) fp32, the same on every rank."""
        if not isinstance(self.partial, Pending):
            return self.partial
        with timed("communication"):
            packed = self.partial.wait()
        # Rounded at once, unless sinks are still to come.
        return merge_packed(packed, self.layer.q.dtype if self.layer.sinks is None else packed.dtype)


def merge_over_ranks(layer: AttentionInput, out: Tensor, lse: Tensor, group: Group) -> Merging:
    """Start to merge partial results over the ranks: out (rows, heads, head_dim), lse (heads, rows) fp32."""
    if group.size == 1:
        return Merging(layer, (out, lse))
    return Merging(layer, group.all_gather(pack(out, lse)))


def full_partial(layer: AttentionInput, rows: NewRows, backend: str) -> tuple[Tensor, Tensor]:
    """Rows over this rank's shard: out (rows, heads, head_dim) and lse (heads, rows) fp32."""
    segments = [] if layer.earlier is None else [Segment(*layer.earlier)]
    segments.append(Segment(layer.k, layer.v, causal=rows.holds_own(layer.q.shape[0])))
    with timed("attention"):
        return attention(layer.q, segments, layer.scale, backend, layer.softcap)


def window_partial(layer: AttentionInput, rows: NewRows, backend: str) -> tuple[Tensor, Tensor]:
    """As :func:`full_partial`, for a layer with a window: keys outside it are not read."""
    assert layer.window is not None
    since = first_seen(rows.first, layer.window, layer.chunked)
    runs = [] if layer.earlier is None else _runs(*layer.earlier, rows.earlier, since)
    runs += _runs(layer.k, layer.v, rows.positions, since)
    return windowed(layer, layer.q, rows.first, runs, backend)


def windowed(layer: AttentionInput, q: Tensor, first: int, runs: Sequence[Run], backend: str) -> tuple[Tensor, Tensor]:
    """Rows q at positions from ``first`` on over runs of keys, within the layer's window: out and lse."""
    assert layer.window is not None
    kernel = chunked_attention if layer.chunked else window_attention

    def attend(q: Tensor, segments: list[Segment]) -> tuple[Tensor, Tensor]:
        return attention(q, segments, layer.scale, backend, layer.softcap)

    with timed("attention"):
        return kernel(attend, q, first, runs, layer.window)


def _runs(k: Tensor, v: Tensor, held: Sequence[range], since: int) -> list[Run]:
    """Keys at these positions by runs, without those that end before position ``since``: adjacent ranges are joined."""
    runs: list[Run] = []
    row = 0
    for positions in held:
        stop = row + len(positions)
        if runs and runs[-1].stop == positions.start:
            start, first = row - runs[-1].k.shape[0], runs[-1].first
            runs[-1] = Run(k[start:stop], v[start:stop], first)
        elif positions.stop > since and positions:
            runs.append(Run(k[row:stop], v[row:stop], positions.start))
        row = stop
    return runs
