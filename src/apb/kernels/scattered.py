"""Sliding-window attention of rows and keys whose positions have gaps, as above a layer of propagation."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import capped

# Rows whose keys are found together: bounds the (heads, rows, keys) matrix.
_ROWS = 128


def scattered_window(
    q: Tensor,
    rows: Sequence[int],
    k: Tensor,
    v: Tensor,
    keys: Sequence[int],
    window: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A row at position p sees the keys at positions (p - window, p].

    Args:
        q: (rows, heads, head_dim).
        rows: their positions, ascending.
        k, v: (keys, kv_heads, head_dim).
        keys: their positions, ascending; every row's own is among them.
        window: number of positions that a row sees, its own included.
        scale: factor on q.k.
        softcap: as in :func:`apb.attention`.

    Returns:
        out (rows, heads, head_dim) fp32 and lse (heads, rows) fp32.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    out, lse = q.new_empty(q.shape, dtype=torch.float32), q.new_empty(heads, len(rows), dtype=torch.float32)
    for first in range(0, len(rows), _ROWS):
        places = rows[first : first + _ROWS]
        seen = slice(bisect.bisect_right(keys, places[0] - window), bisect.bisect_right(keys, places[-1]))
        at = torch.tensor(places, device=q.device)[:, None]
        key = torch.tensor(keys[seen], device=q.device)
        hidden = (key > at) | (key <= at - window)
        grouped = q[first : first + _ROWS].float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        logits = capped(grouped @ k[seen].float().permute(1, 2, 0)[:, None] * scale, softcap)
        logits = logits.masked_fill(hidden, -torch.inf)
        mixed = logits.softmax(-1) @ v[seen].float().transpose(0, 1)[:, None]
        out[first : first + _ROWS] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
        lse[:, first : first + _ROWS] = logits.logsumexp(-1).flatten(0, 1)
    return out, lse
