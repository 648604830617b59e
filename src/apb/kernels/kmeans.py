"""Spherical k-means of many points, several problems at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# Keys hardly change their cluster after a few rounds.
_ROUNDS = 10
# Similarities that are held at a time.
_MOST = 1 << 26


def kmeans(points: Tensor, clusters: int) -> Tensor:
    """The cluster of every point, by the largest cosine; deterministic.

    Centroids begin as points at even distances. One that loses all its points stays where it was.

    Args:
        points: (problems, points, channels) fp32 of length 1.
        clusters: of each problem, at most its points.

    Returns:
        (problems, points) int64.
    """
    problems, count, _ = points.shape
    start = torch.arange(clusters, device=points.device) * count // clusters
    centroids = points[:, start]
    rows = max(_MOST // (problems * clusters), 1)
    for round_ in range(_ROUNDS):
        labels = torch.cat([(part @ centroids.transpose(1, 2)).argmax(2) for part in points.split(rows, 1)], 1)
        if round_ + 1 < _ROUNDS:
            sums = sums_by_label(points, labels, clusters)
            norms = sums.norm(dim=2, keepdim=True)
            centroids = torch.where(norms > 0, sums / norms.clamp(min=1e-12), centroids)
    return labels


def sums_by_label(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Sum of every cluster's points: (problems, clusters, channels), of (problems, points, channels) and labels."""
    sums = points.new_zeros(points.shape[0], clusters, points.shape[2])
    return sums.scatter_add_(1, labels.unsqueeze(2).expand_as(points), points)
