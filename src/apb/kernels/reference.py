"""Attention in plain fp32 torch: the reference for every other back-end, and the fallback where none of them runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .segment import Segment

# Largest (heads, rows, keys) score matrix, in elements: longer inputs are computed in chunks of rows.
MOST_SCORES = 1 << 27


def attention(q: Tensor, segments: list[Segment], scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`apb.attention`."""
    rows, heads, head_dim = q.shape
    segments = [Segment(segment.k.float(), segment.v.float(), segment.causal) for segment in segments]
    chunk = max(MOST_SCORES // max(heads * sum(segment.k.shape[0] for segment in segments), 1), 1)
    out, lse = torch.empty_like(q), q.new_empty(heads, rows, dtype=torch.float32)
    for start in range(0, rows, chunk):
        part = q[start : start + chunk].float()
        scores = [part.new_zeros(heads, len(part), 0)]
        for k, causal in ((segment.k, segment.causal) for segment in segments):
            # One product for all heads that share keys: (rows, heads, d) to (kv_heads, group * rows, d).
            grouped = part.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)
            score = (grouped @ k.permute(1, 2, 0)).view(heads, len(part), len(k)) * scale
            score = capped(score, softcap)
            if causal:
                row = torch.arange(start, start + len(part), device=q.device)[:, None]
                key = torch.arange(len(k), device=q.device)[None, :]
                score = score.masked_fill(key > row + len(k) - rows, float("-inf"))
            scores.append(score)
        score = torch.cat(scores, -1)
        total = score.logsumexp(-1)
        # A row that sees no key has lse -inf; its weights must be 0, not nan.
        weights = (score - total.masked_fill(total.isneginf(), 0.0)[..., None]).exp()
        mixed = part.new_zeros(heads, len(part), head_dim)
        shares = weights.split([len(segment.v) for segment in segments], -1) if segments else ()
        for share, segment in zip(shares, segments, strict=True):
            v = segment.v.transpose(0, 1)  # (kv_heads, keys, d)
            grouped = share.unflatten(0, (v.shape[0], -1)).flatten(1, 2)
            mixed += (grouped @ v).view(heads, len(part), head_dim)
        out[start : start + chunk] = mixed.transpose(0, 1).to(q.dtype)
        lse[:, start : start + chunk] = total
    return out, lse


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(scores / softcap), or ``scores`` unchanged if ``softcap`` is None."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
