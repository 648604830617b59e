"""Spherical k-means of many points, several problems at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# Few keys change their cluster later, and what they attract hardly changes.
_ROUNDS = 4
# Similarities that are held at a time.
_MOST = 1 << 26


def kmeans(points: Tensor, clusters: int) -> Tensor:
    """The cluster of every point, by the largest cosine; deterministic, on GPUs too.

    Centroids begin as points at even distances. One that loses all its points stays where it was.

    Args:
        points: (problems, points, channels) of length 1, of the dtype that products are to be made in.
        clusters: of each problem, at most its points.

    Returns:
        (problems, points) int64.
    """
    together = max(_MOST // (points.shape[1] * clusters), 1)
    return torch.cat([_kmeans(part, clusters) for part in points.split(together)])


def two_levels(points: Tensor, runs: int, size: int) -> tuple[Tensor, int]:
    """Clusters of ``size`` points on average, at the cost of comparing every point with those of one run.

    The points are clustered into ``runs`` clusters, sorted by them, and cut into as many runs of equal length, in which
    clusters are made apart.

    Args:
        points: as in :func:`kmeans`; ``runs`` divides their number.

    Returns:
        labels (problems, points) int64, and the number of clusters.
    """
    if runs == 1:
        return kmeans(points, points.shape[1] // size), points.shape[1] // size
    order = kmeans(points, runs).argsort(dim=1, stable=True)
    problems = points.gather(1, order.unsqueeze(2).expand_as(points)).unflatten(1, (runs, -1))
    clusters = problems.shape[2] // size
    found = kmeans(problems.flatten(0, 1), clusters).unflatten(0, problems.shape[:2])
    found += torch.arange(runs, device=found.device).unsqueeze(1) * clusters
    return torch.empty_like(order).scatter_(1, order, found.flatten(1)), runs * clusters


def _kmeans(points: Tensor, clusters: int) -> Tensor:
    """As :func:`kmeans`, of as many problems as fit in memory."""
    start = torch.arange(clusters, device=points.device) * points.shape[1] // clusters
    centroids = points[:, start]
    labels = _nearest(points, centroids)
    for _ in range(_ROUNDS - 1):
        sums = _sums(points, labels, clusters)
        norms = sums.norm(dim=2, keepdim=True)
        centroids = torch.where(norms > 0, (sums / norms.clamp(min=1e-12)).to(points.dtype), centroids)
        labels = _nearest(points, centroids)
    return labels


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    return (points @ centroids.transpose(1, 2)).argmax(2)


def _sums(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """As :func:`sums_by_label`, as a product: atomic additions would come in any order on a GPU."""
    if not points.is_cuda:
        return sums_by_label(points, labels, clusters)
    members = labels.unsqueeze(1) == torch.arange(clusters, device=labels.device).unsqueeze(1)
    return (members.to(points.dtype) @ points).float()


def sums_by_label(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Sum of every cluster's points: (problems, clusters, channels), of (problems, points, channels) and labels."""
    sums = points.new_zeros(points.shape[0], clusters, points.shape[2])
    return sums.scatter_add_(1, labels.unsqueeze(2).expand_as(points), points)
