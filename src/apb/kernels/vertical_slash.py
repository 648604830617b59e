"""Attention over chosen columns and diagonals, tile by tile in plain torch; what no tile needs is not computed."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import capped

TILE = 128


def vertical_slash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    diagonals: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Row i sees key j <= i where column j or diagonal i - j is chosen for its head.

    Args:
        q: (rows, heads, head_dim).
        k, v: (rows, kv_heads, head_dim), the same rows' keys and values.
        columns, diagonals: (heads, >= rows) bool; every row must see some key (diagonal 0, say).
        scale, softcap: as in :func:`apb.attention`.

    Returns:
        out (rows, heads, head_dim) in q's dtype and lse (heads, rows) fp32; arithmetic in fp32 after q.k.
    """
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    out, lse = torch.empty_like(q), q.new_empty(heads, rows, dtype=torch.float32)
    positions = torch.arange(rows, device=q.device)
    for head in range(heads):
        column, diagonal = columns[head], diagonals[head]
        keys, values = k[:, head // group], v[:, head // group]
        chosen = column[:rows].nonzero()[:, 0]
        offsets = diagonal[:rows].nonzero()[:, 0]
        # Rows [s, s + TILE) reach along a diagonal into two tiles of keys, so many tiles before their own.
        back = torch.cat([offsets // TILE, (offsets + TILE - 1) // TILE]).unique()
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
