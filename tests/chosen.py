"""The keys that decode methods choose, one key at a time in numpy: the reference of what `apb.decoding` computes."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from apb.decoding import Indexed, Pages

# Keys at a shard's end that are always attended to, counted from the row that asks.
RECENT = 64


def chosen(method: Indexed, q: Tensor, k: Tensor, scale: float, own: int = 0) -> np.ndarray:
    """True where an answer's first row, q (heads, head_dim), attends to a key of one shard: (kv_heads, keys) bool.

    k is (keys, kv_heads, head_dim); ``own``: 1 if the row's own key is the last of them.
    """
    keys = k.double().numpy().transpose(1, 0, 2)
    rows = q.double().numpy().reshape(len(keys), -1, q.shape[-1]) * scale
    may = max(keys.shape[1] - own - RECENT, 0)
    by, size = (by_pages, method.page_size) if isinstance(method, Pages) else (by_clusters, method.cluster_size)
    covered = may // size * size if by is by_pages else may if may >= size else 0
    seen = np.ones(keys.shape[:2], dtype=bool)
    if covered:
        budget = covered - math.ceil((1 - method.share) * keys.shape[1])
        seen[:, :covered] = by(rows, keys[:, :covered], budget, size)
    return seen


def by_pages(rows: np.ndarray, keys: np.ndarray, budget: int, size: int) -> np.ndarray:
    """Quest's: the pages of the largest bounds, by the softmax of the head to which a page promises most."""
    seen = np.zeros(keys.shape[:2], dtype=bool)
    for head, (queries, mine) in enumerate(zip(rows, keys, strict=True)):
        pages = mine.reshape(-1, size, mine.shape[-1])
        promised = np.full(len(pages), -math.inf)
        for q in queries:
            bounds = np.array([np.maximum(q * page.min(0), q * page.max(0)).sum() for page in pages])
            promised = np.maximum(promised, bounds - np.log(np.exp(bounds).sum()))
        seen[head] = np.repeat(best(promised, np.full(len(pages), size), budget), size)
    return seen


def by_clusters(rows: np.ndarray, keys: np.ndarray, budget: int, size: int) -> np.ndarray:
    """Squeezed Attention's: clusters above the threshold that leaves as many keys as all KV heads may have."""
    count, scores, sizes, labels = keys.shape[1] // size, [], [], []
    for queries, mine in zip(rows, keys, strict=True):
        label = kmeans(mine, count)
        held = np.bincount(label, minlength=count)
        assert held.all(), "these tests have no empty clusters"
        means = np.stack([mine[label == cluster].mean(0) for cluster in range(count)])
        logits = queries @ means.T
        scores.append((logits - np.log((held * np.exp(logits)).sum(1, keepdims=True))).max(0))
        sizes.append(held)
        labels.append(label)
    taken = best(np.concatenate(scores), np.concatenate(sizes), len(keys) * budget).reshape(len(keys), count)
    return np.stack([mine[label] for mine, label in zip(taken, labels, strict=True)])


def best(scores: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """The best units that fit into the budget, at least the very best. Scores, logarithms of shares, count to 18 binary
    digits between 1/64 and 1024 below 0, and those that are then equal are in or out together."""
    places = np.clip(-scores, 1 / 64, 1024).astype(np.float32).view(np.int32) >> 5
    last = places.min()
    for place in np.unique(places):
        if sizes[places <= place].sum() <= budget:
            last = max(last, place)
    return places <= last


def kmeans(keys: np.ndarray, count: int) -> np.ndarray:
    """Spherical k-means as the paper's."""
    points = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    centroids = np.stack([points[index * len(points) // count] for index in range(count)])
    labels = np.zeros(len(points), dtype=int)
    for turn in range(4):
        labels = np.array([int(np.argmax(centroids @ point)) for point in points])
        for cluster in range(count if turn < 3 else 0):
            if (labels == cluster).any():
                mean = points[labels == cluster].sum(0)
                centroids[cluster] = mean / np.linalg.norm(mean)
    return labels


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: np.ndarray) -> np.ndarray:
    """A row's attention over the keys of bool (kv_heads, keys): (heads, head_dim), a dense masked softmax in fp64."""
    group = q.shape[0] // k.shape[1]
    keys, values = (np.repeat(x.double().numpy(), group, 1) for x in (k, v))
    logits = np.einsum("hd,khd->hk", q.double().numpy(), keys) * scale
    logits = np.where(np.repeat(seen, group, 0), logits, -math.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(1, keepdims=True), values)
