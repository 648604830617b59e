"""Attention within a window out of calls of the one attention operation: no mask, and no masked work.

The rows of a sliding window are processed in chunks no longer than the window. The keys that a chunk sees are then of
three kinds: those at and just before its own rows, seen causally; those that all of its rows see; and those that leave
the window one by one, which are causal once rows and keys are both reversed. A window whose edge stands still, as in
chunked attention, has no keys of the third kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .merge import merge_into
from .segment import Segment

# Chunks computed in one call become heads, whose number kernels limit.
MOST_HEADS = 16384

# (q, segments) -> (out, lse), as apb.attention with its other arguments filled in.
Attend = Callable[[Tensor, list[Segment]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Run:
    """Keys and values (keys, kv_heads, head_dim) at consecutive positions that start at ``first``."""

    k: Tensor
    v: Tensor
    first: int

    @property
    def stop(self) -> int:
        """Position after the last key."""
        return self.first + self.k.shape[0]

    def between(self, start: int, stop: int, causal: bool = False, backwards: bool = False) -> Segment:
        """Segment of the keys at positions [start, stop), in reverse order if ``backwards``."""
        k, v = self.k[start - self.first : stop - self.first], self.v[start - self.first : stop - self.first]
        return Segment(k.flip(0), v.flip(0), causal) if backwards else Segment(k, v, causal)


def window_attention(attend: Attend, q: Tensor, first: int, runs: Sequence[Run], window: int) -> tuple[Tensor, Tensor]:
    """Row i, at position ``first`` + i, sees the keys at positions (first + i - window, first + i].

    Args:
        attend: the attention operation.
        q: (rows, heads, head_dim), at consecutive positions.
        runs: disjoint runs of keys at and before the rows' positions; a run that holds the key of any row's own
            position holds those of all rows. Keys outside the window are ignored.
        window: maximum number of keys that a row sees, its own included.

    Returns:
        out (rows, heads, head_dim) in fp32 or q's dtype, and lse (heads, rows) fp32, as :func:`apb.attention`.
    """
    rows = q.shape[0]
    outs, lses = [], []
    row = 0
    while row < rows:
        chunks = _whole_chunks(q, first, row, runs, window)
        if chunks:
            stop = row + chunks * window
            out, lse = _side_by_side(attend, q[row:stop], first + row, runs[0], window)
        else:
            stop = min(row + window, rows)
            out, lse = _chunk(attend, q[row:stop], first + row, runs, window)
        outs.append(out)
        lses.append(lse)
        row = stop
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs), torch.cat(lses, 1)


def chunked_attention(attend: Attend, q: Tensor, first: int, runs: Sequence[Run], chunk: int) -> tuple[Tensor, Tensor]:
    """As :func:`window_attention`, but a row sees the keys from the last multiple of ``chunk`` on up to its own."""
    outs, lses = [], []
    row, rows = 0, q.shape[0]
    while row < rows:
        start = first + row
        edge = start - start % chunk
        stop = min(edge + chunk, first + rows)
        seen = [
            run.between(max(run.first, edge), min(run.stop, stop), causal=run.stop >= stop)
            for run in runs
            if max(run.first, edge) < min(run.stop, stop)
        ]
        out, lse = attend(q[row : stop - first], seen)
        outs.append(out)
        lses.append(lse)
        row = stop - first
    return torch.cat(outs), torch.cat(lses, 1)


def _whole_chunks(q: Tensor, first: int, row: int, runs: Sequence[Run], window: int) -> int:
    """Number of full chunks from ``row`` on whose keys all lie in a single run; 0 with several runs."""
    if len(runs) != 1 or window < 2 or runs[0].first > first + row - window + 1 or runs[0].stop < first + q.shape[0]:
        return 0
    return min((q.shape[0] - row) // window, max(MOST_HEADS // q.shape[1], 1))


def _side_by_side(attend: Attend, q: Tensor, start: int, run: Run, window: int) -> tuple[Tensor, Tensor]:
    """Attend chunks of exactly ``window`` rows in two calls, with the chunks laid out as heads."""
    rows, heads, _ = q.shape
    chunks = rows // window
    at = start - run.first
    grouped = _beside(q, chunks)
    own = Segment(_beside(run.k[at : at + rows], chunks), _beside(run.v[at : at + rows], chunks), causal=True)
    out, lse = attend(grouped, [own])
    # The first row of a chunk still sees the window - 1 keys before it, the last row none of them.
    before = slice(at - window + 1, at + rows - window)
    k, v = (_stepping(x[before], window).flip(0) for x in (run.k, run.v))
    back, back_lse = attend(grouped[:-1].flip(0), [Segment(k, v, causal=True)])
    out, lse = _add(out, lse, 0, back.flip(0), back_lse.flip(1))
    out = out.unflatten(1, (chunks, heads)).transpose(0, 1).flatten(0, 1)
    lse = lse.unflatten(0, (chunks, heads)).transpose(0, 1).flatten(1)
    return out, lse


def _beside(x: Tensor, chunks: int) -> Tensor:
    """(chunks * window, heads, d) to (window, chunks * heads, d)."""
    return x.unflatten(0, (chunks, -1)).transpose(0, 1).flatten(1, 2)


def _stepping(x: Tensor, window: int) -> Tensor:
    """Runs of ``window`` - 1 keys, one every ``window``: (keys, heads, d) to (window - 1, chunks * heads, d)."""
    return x.unfold(0, window - 1, window).permute(3, 0, 1, 2).flatten(1, 2)


def _chunk(attend: Attend, q: Tensor, start: int, runs: Sequence[Run], window: int) -> tuple[Tensor, Tensor]:
    """Attend at most ``window`` rows over any number of runs."""
    stop = start + q.shape[0]
    seen: list[Segment] = []
    parts: list[tuple[int, Tensor, Tensor]] = []
    for run in runs:
        since = max(run.first, stop - window)  # from here on every row sees all keys before it
        if run.stop >= stop:
            seen.append(run.between(since, stop, causal=True))
        elif run.stop > since:
            seen.append(run.between(since, run.stop))
        x, y = max(run.first, start - window + 1), min(run.stop, stop - window)
        if x < y:  # keys that leave the window within the chunk: the row at x + window - 1 is the last that sees key x
            whole, part = x + window - 1 - start, y + window - 1 - start
            if whole:
                parts.append((0, *attend(q[:whole], [run.between(x, y)])))
            out, lse = attend(q[whole:part].flip(0), [run.between(x, y, causal=True, backwards=True)])
            parts.append((whole, out.flip(0), lse.flip(1)))
    out, lse = attend(q, seen)
    for row, part_out, part_lse in parts:
        out, lse = _add(out, lse, row, part_out, part_lse)
    return out, lse


def _add(out: Tensor, lse: Tensor, row: int, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge a partial result of the rows from ``row`` on into ``out`` and ``lse``."""
    stop = row + part.shape[0]
    out = out.float()
    merge_into(out[row:stop], lse[:, row:stop], part, part_lse)
    return out, lse
