"""Attention over chosen columns and diagonals; tiles without a chosen one are not computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .merge import merge
from .reference import capped

TILE = 128
# Number of shapes that FlexAttention may be compiled for: enough for some dozen lengths.
_SHAPES = 64


def vertical_slash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    diagonals: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Row i sees key j <= i if column j or diagonal i - j is chosen for its head.

    Block-sparse FlexAttention on GPUs, plain torch elsewhere.

    Args:
        q: (rows, heads, head_dim).
        k, v: (rows, kv_heads, head_dim), the same rows' keys and values.
        columns, diagonals: (heads, >= rows) bool; diagonal 0 must be chosen for every head: every row sees a key.
        scale, softcap: as in :func:`apb.attention`.

    Returns:
        out (rows, heads, head_dim) in q's dtype and lse (heads, rows) fp32; arithmetic in fp32 after q.k.
    """
    engine = by_flex if q.device.type == "cuda" else by_tiles
    return engine(q, k, v, columns, diagonals, scale, softcap)


def by_tiles(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, diagonals: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`vertical_slash`, one head and one tile of rows at a time."""
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    out, lse = torch.empty_like(q), q.new_empty(heads, rows, dtype=torch.float32)
    positions = torch.arange(rows, device=q.device)
    for head in range(heads):
        column, diagonal = columns[head], diagonals[head]
        keys, values = k[:, head // group], v[:, head // group]
        chosen = column[:rows].nonzero()[:, 0]
        back = _tiles_back(diagonal[None, :rows])[0].nonzero()[:, 0]
        for start in range(0, rows, TILE):
            row = positions[start : start + TILE]
            tiles = start // TILE - back
            seen = torch.zeros(min(start + TILE, rows), dtype=torch.bool, device=q.device)
            seen[chosen[chosen < len(seen)]] = True
            reached = (tiles[tiles >= 0, None] * TILE + positions[:TILE]).flatten()
            seen[reached[reached < len(seen)]] = True
            key = seen.nonzero()[:, 0]
            distance = row[:, None] - key
            visible = (distance >= 0) & (column[key] | diagonal[distance.clamp(min=0)])
            scores = capped((q[row, head] @ keys[key].T).float() * scale, softcap).masked_fill(~visible, float("-inf"))
            weights = scores.softmax(-1)
            lse[head, row] = scores.logsumexp(-1)
            out[row, head] = weights.to(q.dtype) @ values[key]
    return out, lse


def by_flex(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, diagonals: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`vertical_slash` in two parts: the tiles that diagonals cross, then the gathered columns.

    Both run in block-sparse FlexAttention and are merged by log-sum-exp. Columns skip keys on chosen diagonals, so no
    key counts twice.
    """
    from torch.nn.attention.flex_attention import BlockMask

    asked, heads, _ = q.shape
    group = heads // k.shape[1]
    # Every shape is compiled separately: padding with rows of zeros, which no other row sees, leaves few shapes.
    rows = _rounded(asked)
    q, k, v = (pad(x, (0, 0, 0, 0, 0, rows - asked)) for x in (q, k, v))
    columns, diagonals = (pad(x[:, :asked], (0, rows - asked)) for x in (columns, diagonals))
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))

    def on_diagonal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & diagonals[head, (row - key).clamp(min=0)]

    # Tile row t reaches tile t - b for every chosen b <= t, nearest first.
    back = _tiles_back(diagonals)
    count = back.cumsum(1, dtype=torch.int32)
    nearest = back.int().argsort(dim=1, descending=True, stable=True)
    tile = torch.arange(back.shape[1], device=q.device)
    tiles = (tile[:, None] - nearest[:, None]).clamp(min=0).int()
    blocks = BlockMask.from_kv_blocks(
        count[None],
        tiles[None],
        BLOCK_SIZE=TILE,
        mask_mod=on_diagonal,
        seq_lengths=(rows, rows),
        compute_q_blocks=False,
    )
    flex = _flex(q.device.type, softcap)
    slashes = flex(q4, k4, v4, blocks, scale)

    # Heads may choose different columns, but equally many, except for columns past the document's end.
    width = min(_rounded(int(columns.sum(1).max())), rows)
    order = columns.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    position = torch.where(columns.gather(1, order), order, rows)  # past the end: seen by no row
    # Row tiles before a head's c-th column never see it: a row tile visits the column tiles that begin at or before
    # its last row.
    first = position[:, ::TILE]
    last_row = (tile + 1) * TILE - 1
    reached = (first[:, None] <= last_row[:, None]).sum(2, dtype=torch.int32)
    column_tile = torch.arange(first.shape[1], device=q.device, dtype=torch.int32)

    def beside(batch: Tensor, head: Tensor, row: Tensor, index: Tensor) -> Tensor:
        key = position[head, index]
        return (key <= row) & ~diagonals[head, (row - key).clamp(min=0)]

    blocks = BlockMask.from_kv_blocks(
        reached[None],
        column_tile.expand(1, heads, len(tile), -1).contiguous(),
        BLOCK_SIZE=TILE,
        mask_mod=beside,
        seq_lengths=(rows, width),
        compute_q_blocks=False,
    )
    source = torch.arange(heads, device=q.device)[:, None] // group
    order = order.clamp(max=rows - 1)
    gathered = flex(q4, k4[:, source, order], v4[:, source, order], blocks, scale)
    outs, lses = zip(*((out[0].transpose(0, 1), lse[0]) for out, lse in (slashes, gathered)), strict=True)
    out, lse = merge(outs, lses)
    return out[:asked].to(q.dtype), lse[:, :asked]


def _rounded(count: int) -> int:
    """``count`` rounded up to a multiple of TILE, with at most eight values between consecutive powers of two."""
    step = max(TILE, 1 << max(0, (count - 1).bit_length() - 4))
    return max(1, -(-count // step)) * step


def _tiles_back(diagonals: Tensor) -> Tensor:
    """From (heads, rows) chosen diagonals to (heads, tiles) bool: entry b is True if row tile t sees key tile t - b.

    Along a diagonal, rows [s, s + TILE) see two tiles of keys, or one if the diagonal is a multiple of TILE.
    """
    heads, rows = diagonals.shape
    tiles = -(-rows // TILE)
    padded = diagonals.new_zeros(heads, tiles * TILE)
    padded[:, :rows] = diagonals
    by_tile = padded.view(heads, tiles, TILE)
    reach = by_tile.any(2)
    reach[:, 1:] |= by_tile[:, :-1, 1:].any(2)
    return reach


@cache
def _flex(device: str, softcap: float | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """(q, k, v, block mask, scale) -> (out, natural log-sum-exp fp32), compiled on GPUs."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def cap(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return capped(score, softcap)

    def call(q: Tensor, k: Tensor, v: Tensor, blocks: Any, scale: float) -> tuple[Tensor, Tensor]:
        out, aux = flex_attention(
            q,
            k,
            v,
            score_mod=None if softcap is None else cap,
            block_mask=blocks,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        return out, aux.lse

    if device != "cuda":
        return call
    compiled = torch.compile(call, dynamic=False)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        # Past dynamo's recompile limit FlexAttention would run eagerly and materialize the whole score matrix.
        with torch._dynamo.config.patch(recompile_limit=_SHAPES):
            return compiled(*args)

    return run
