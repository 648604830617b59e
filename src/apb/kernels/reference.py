"""Attention in plain fp32 torch: what every other back-end is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from .segment import Segment


def attention(q: Tensor, segments: list[Segment], scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`apb.attention`. Holds a (heads, rows, keys) matrix in fp32: for small inputs."""
    rows, heads, head_dim = q.shape
    scores, values = [q.new_zeros(heads, rows, 0, dtype=torch.float32)], [q.new_zeros(0, heads, head_dim).float()]
    for segment in segments:
        keys, kv_heads, _ = segment.k.shape
        group = heads // kv_heads
        k = segment.k.float().repeat_interleave(group, 1)
        score = torch.einsum("rhd,khd->hrk", q.float(), k) * scale
        if segment.causal:
            row = torch.arange(rows, device=q.device)[:, None]
            key = torch.arange(keys, device=q.device)[None, :]
            score = score.masked_fill(key > row + keys - rows, float("-inf"))
        scores.append(score)
        values.append(segment.v.float().repeat_interleave(group, 1))
    score = torch.cat(scores, -1)
    lse = score.logsumexp(-1)
    # A row that sees no key has lse -inf; its weights must come out 0, not nan.
    weights = (score - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return torch.einsum("hrk,khd->rhd", weights, torch.cat(values, 0)).to(q.dtype), lse
