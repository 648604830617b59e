"""What a retaining head is taught: the strongest attention that the answer pays to each token of the prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHNESS = 0.0025
"""Weight of the squared difference of neighbouring predictions (Locret, equation of the training loss)."""
TOP = 0.1
"""Share of the tokens that the overlap of prediction and label looks at."""
# Logits held at a time, fp32: 64 MiB.
_LOGITS = 2**24


def answer_attention(q: Tensor, k: Tensor, scale: float, most: int = _LOGITS) -> Tensor:
    """The largest logit that any answer token and any query head of the group gives each token, per KV head.

    The logits are those before the softmax, ``scale * q.k`` after RoPE; only a piece of them exists at a time.

    Args:
        q: (answer tokens, heads, head_dim), after RoPE.
        k: (tokens, kv_heads, head_dim), after RoPE.
        scale: the layer's factor on q.k.
        most: logits to hold at a time.

    Returns:
        (kv_heads, tokens) fp32.
    """
    kv_heads = k.shape[1]
    # (answer tokens, kv_heads * group, head_dim) -> (kv_heads, answer tokens * group, head_dim)
    rows = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2).float()
    keys = k.permute(1, 2, 0).float()  # (kv_heads, head_dim, tokens)
    width = max(1, most // (kv_heads * rows.shape[1]))
    return torch.cat([(rows @ piece).amax(1) for piece in keys.split(width, 2)], 1) * scale


def head_loss(predicted: Tensor, labels: Tensor) -> Tensor:
    """Smooth L1 distance + ``SMOOTHNESS`` times the mean squared difference of neighbours; both (kv_heads, tokens)."""
    steps = predicted.diff(dim=1)
    return F.smooth_l1_loss(predicted, labels) + SMOOTHNESS * steps.square().sum() / max(1, steps.numel())


def top_overlap(predicted: Tensor, labels: Tensor) -> Tensor:
    """Share of the top tenth of tokens by label that is in the top tenth by prediction, mean over KV heads: scalar."""
    count = max(1, round(TOP * labels.shape[1]))
    found, wanted = (
        torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(count).indices, True) for x in (predicted, labels)
    )
    return (found & wanted).sum() / (count * len(labels))
