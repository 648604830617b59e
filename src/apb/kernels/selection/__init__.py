"""Selection of the pairs that a block passes on: scores by the query rows, top tokens, packing for the all-gather.

On NVIDIA GPUs each step takes a launch or two (:mod:`.portable`), elsewhere torch computes it. Equal scores give the
same tokens either way, down to ties. Nothing is read back to the host.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fused import why_not
from ..launching import on_device_of
from ..reference import capped

# Most tokens that a program handles at a time, and its warps: the fastest of those tried on one H200.
_CHUNK, _WARPS = 4096, 16
# Pairs of one KV head copied by a program.
_PAIRS = 32
# Query rows that torch scores at a time: bounds the (heads, rows, tokens) matrix for long questions.
_ROWS = 64
# Programs that share a KV head's keys when the kernel sums exponentials.
_SPLITS = 32


def attention_received(
    query: Tensor,
    k: Tensor,
    scale: float,
    softcap: float | None = None,
    lse: Tensor | None = None,
    *,
    triton: bool | None = None,
) -> Tensor:
    """softmax(q k^T) of every query row over the keys, averaged over the rows and the heads of a group.

    Args:
        query: (rows, heads, head_dim), at least one row.
        k: (tokens, kv_heads, head_dim) of the same dtype, any strides; or (blocks, tokens, kv_heads, head_dim), several
            blocks of keys, each for itself, in as many launches as one.
        scale: factor on q.k.
        softcap: as in :func:`apb.attention`.
        lse: (heads, rows) fp32, log-sum-exps of each row's logits over other keys, which take the place of those over
            ``k``: a weight is then exp(logit - lse), so that weights of keys in different calls compare.
        triton: as for :func:`choose`. The kernels keep logits in fp32 and never materialize their matrix.

    Returns:
        (kv_heads, tokens) fp32, or (blocks, kv_heads, tokens); each KV head's row sums to 1, unless ``lse`` is given.
    """
    rows, heads, head_dim = query.shape
    tokens, kv_heads, _ = k.shape[-3:]
    if k.dim() == 4 and not _by_triton(k, head_dim, triton):
        return torch.stack([attention_received(query, each, scale, softcap, lse, triton=triton) for each in k])
    group = heads // kv_heads
    if lse is not None:  # (kv_heads, rows * group): the order of rows below, and in the kernels
        lse = lse.unflatten(0, (kv_heads, group)).transpose(1, 2).flatten(1)
    if not _by_triton(k, head_dim, triton):
        keys = k.permute(1, 2, 0)  # (kv_heads, head_dim, tokens)
        total = torch.zeros(kv_heads, tokens, dtype=torch.float32, device=k.device)
        for first in range(0, rows, _ROWS):
            # (rows, kv_heads * group, head_dim) -> (kv_heads, rows * group, head_dim)
            chunk = query[first : first + _ROWS].unflatten(1, (kv_heads, -1))
            grouped = chunk.transpose(0, 1).reshape(kv_heads, -1, head_dim)
            logits = capped((grouped @ keys).float() * scale, softcap)
            if lse is None:
                weights = logits.softmax(-1)
            else:
                weights = (logits - lse[:, first * group : (first + _ROWS) * group, None]).exp()
            total += weights.sum(1)
        return total / (rows * group)
    from . import portable

    query, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, k))
    blocks = 1 if k.dim() == 3 else len(k)
    padded = max(16, 1 << (head_dim - 1).bit_length())
    width = padded * k.element_size()
    block_m, block_n = (64, 128) if width <= 256 else (32, 64) if width <= 512 else (16, 32)
    packed = min(max(16, 1 << (rows * group - 1).bit_length()), block_m)
    splits = 1 if lse is not None else min(_SPLITS, -(-tokens // block_n))
    received = query.new_empty(*k.shape[:-3], kv_heads, tokens, dtype=torch.float32)
    log2e = 1 / math.log(2)
    factors = (scale * log2e, 1.0) if softcap is None else (softcap * log2e, 2 * scale / softcap * log2e)
    strides = (*query.stride()[:2], 0 if k.dim() == 3 else k.stride(0), *k.stride()[-3:-1])
    sizes = {"GROUP": group, "D": head_dim, "BD": padded, "BM": packed, "BN": block_n, "CAPPED": softcap is not None}
    with on_device_of(k):
        if lse is not None:
            sums = (lse * log2e).expand(blocks, -1, -1).contiguous()
        else:
            sums = query.new_empty(splits, blocks * kv_heads, rows * group, dtype=torch.float32)
            portable.sum_exponentials[(splits, blocks * kv_heads, -(-rows * group // packed))](
                query, k, sums, rows, tokens, kv_heads, *strides, *factors, **sizes, num_warps=4, num_stages=2
            )
        portable.attention_received[(-(-tokens // block_n), blocks * kv_heads)](
            query, k, sums, received, rows, tokens, kv_heads, splits, *strides, *factors, **sizes,
            BS=max(2, 1 << (splits - 1).bit_length()), num_warps=4, num_stages=2,
        )  # fmt: skip
    return received


def choose(scores: Tensor, count: int, selectable: int, *, pooled: bool, triton: bool | None = None) -> Tensor:
    """Top tokens, per KV head, of a block's last ``selectable`` tokens; the tokens before those are in the anchor.

    Ties (max-pooling makes many) go to the earlier token, so that the choice depends on neither device nor kernel; nan
    ranks above every number, and -0 equals 0.

    Args:
        scores: (kv_heads, tokens) fp32, any strides.
        count: number of tokens to choose, at most ``selectable``.
        selectable: number of tokens at the block's end that may be chosen.
        pooled: max-pool the scores first (:func:`pool`), also over neighbours that are in the anchor.
        triton: choose with the kernel; by default on GPUs where :func:`apb.kernels.fused.why_not` returns None.

    Returns:
        Indices (kv_heads, min(count, selectable)) int64, ascending.
    """
    kv_heads, tokens = scores.shape
    first = tokens - selectable
    count = min(count, selectable)
    if not _by_triton(scores, 1, triton) or not count:
        if pooled:
            scores = pool(scores)
        best = scores[:, first:].sort(dim=1, descending=True, stable=True).indices[:, :count]
        return best.sort(dim=1).values + first
    from . import portable

    chosen = torch.empty(kv_heads, count, dtype=torch.int64, device=scores.device)
    chunk = min(max(32 * _WARPS, 1 << (selectable - 1).bit_length()), _CHUNK)
    ranks = torch.empty(kv_heads, -(-selectable // chunk) * chunk, dtype=torch.uint32, device=scores.device)
    with on_device_of(scores):
        portable.choose[(kv_heads,)](
            scores, ranks, chosen, tokens, first, count, *scores.stride(), POOLED=pooled, CHUNK=chunk, num_warps=_WARPS
        )
    return chosen


def pack(k: Tensor, v: Tensor, chosen: Tensor, out: Tensor, *, triton: bool | None = None) -> None:
    """Write the chosen pairs of a block into ``out``.

    Args:
        k, v: (tokens, kv_heads, head_dim), any strides.
        chosen: (kv_heads, count) int64, contiguous, as :func:`choose` returns it.
        out: (2, count, kv_heads, head_dim) of the same dtype: keys, then values. Contiguous in its last dimension,
            otherwise any strides, so that it may be a view of the send buffer.
        triton: as for :func:`choose`.
    """
    kv_heads, count = chosen.shape
    head_dim = k.shape[2]
    if not _by_triton(k, head_dim, triton) or not count:
        for x, place in zip((k, v), out, strict=True):
            place.copy_(torch.gather(x, 0, chosen.T.unsqueeze(-1).expand(-1, -1, head_dim)))
        return
    from . import portable

    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    with on_device_of(k):
        portable.pack[(-(-count // _PAIRS), kv_heads)](
            k, v, chosen, out, count, *k.stride()[:2], *v.stride()[:2], *out.stride()[:3], D=head_dim,
            BD=1 << (head_dim - 1).bit_length(), PAIRS=_PAIRS, num_warps=4,
        )  # fmt: skip


def pool(scores: Tensor) -> Tensor:
    """Max-pool (kernel 5, stride 1, padding 2) over a block's tokens, so that a high score raises its neighbours.

    From the reference code, not the paper. ``scores`` and the result are (kv_heads, tokens).
    """
    return F.max_pool1d(scores.unsqueeze(0), kernel_size=5, stride=1, padding=2).squeeze(0)


def _by_triton(x: Tensor, head_dim: int, asked: bool | None) -> bool:
    return x.is_cuda and why_not(x.device, x.dtype, head_dim) is None if asked is None else asked
