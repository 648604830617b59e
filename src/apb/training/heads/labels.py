"""Labels and loss of retaining heads: the largest attention logit of the answer on each token of the prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHNESS = 0.0025
"""Weight of the squared difference of neighbouring predictions (Locret's training loss)."""
TOP = 0.1
"""Share of the tokens whose overlap between prediction and label is measured."""
# Logits held at a time: 64 MiB in fp32.
_LOGITS = 2**24


def answer_attention(q: Tensor, k: Tensor, scale: float, most: int = _LOGITS) -> Tensor:
    """Largest logit of each token over all answer tokens and the query heads of a group, per KV head.

    Logits are ``scale * q.k`` after RoPE, before the softmax, computed in chunks of tokens.

    Args:
        q: (answer tokens, heads, head_dim), after RoPE.
        k: (tokens, kv_heads, head_dim), after RoPE.
        scale: the layer's factor on q.k.
        most: number of logits held at a time.

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
    """Smooth L1 + ``SMOOTHNESS`` x mean squared difference of neighbouring predictions; inputs (kv_heads, tokens).

    Smooth L1 compares what is above or below the mean over the tokens, since selection asks for no more than their
    order. In some layers the mean of the labels is far larger than the differences, and another for every answer: in
    layer 0 of Qwen2.5-Coder-0.5B about 1000 beside 10, by the biases of q and k. A head that has to predict it learns
    nothing else, and its scores in bf16 are multiples of 4.
    """
    steps = predicted.diff(dim=1)
    above, wanted = (x - x.mean(1, keepdim=True) for x in (predicted, labels))
    return F.smooth_l1_loss(above, wanted) + SMOOTHNESS * steps.square().sum() / max(1, steps.numel())


def top_overlap(predicted: Tensor, labels: Tensor) -> Tensor:
    """Share of the top tenth of tokens by label that is also the top tenth by prediction, averaged over KV heads."""
    count = max(1, round(TOP * labels.shape[1]))
    found, wanted = (
        torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(count).indices, True) for x in (predicted, labels)
    )
    return (found & wanted).sum() / (count * len(labels))
