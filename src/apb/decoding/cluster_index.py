"""Clusters of keys, which :class:`Squeezed` chooses by."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import chosen
from ..kernels.kmeans import sums_by_label, two_levels
from .selecting import KeyIndex

# Clusters that a key is compared with, on average, once it is known to which of the coarse ones it belongs.
_RUN = 64
# With fewer coarse clusters than these, keys that belong together are often cut apart.
_LEAST_RUNS = 8


class ClusterIndex(KeyIndex):
    """The cluster of every key, and every cluster's mean. Keys that come later have clusters of their own.

    Attributes:
        labels: (kv_heads, covered) int32.
        means: (kv_heads, clusters, head_dim) of the keys' dtype, of the keys as they are.
        sizes: (kv_heads, clusters) int32; a cluster may be empty.
    """

    def __init__(self, cluster_size: int) -> None:
        self.cluster_size = cluster_size
        self.labels: Tensor | None = None
        self.means: Tensor | None = None
        self.sizes: Tensor | None = None

    def extend(self, keys: Tensor) -> None:
        """See :meth:`KeyIndex.extend`: a few of the last new keys may stay uncovered, and so few as make no cluster."""
        runs = keys.shape[1] // (_RUN * self.cluster_size)
        runs = runs if runs >= _LEAST_RUNS else 1
        new = keys[:, : keys.shape[1] // runs * runs].float()
        if new.shape[1] < self.cluster_size:
            return
        # Products in 16 bits take an eighth of the time on a GPU, more time on a CPU.
        points = torch.nn.functional.normalize(new, dim=2).to(keys.dtype if keys.is_cuda else torch.float32)
        labels, clusters = two_levels(points, runs, self.cluster_size)
        sizes = _counts(labels, clusters)
        means = sums_by_label(new, labels, clusters) / sizes.clamp(min=1).unsqueeze(2)
        labels, means = labels.int(), means.to(keys.dtype)
        if self.labels is not None and self.means is not None and self.sizes is not None:
            labels = torch.cat([self.labels, labels + self.means.shape[1]], 1)
            means, sizes = torch.cat([self.means, means], 1), torch.cat([self.sizes, sizes], 1)
        self.labels, self.means, self.sizes, self.covered = labels, means, sizes, labels.shape[1]

    def forget(self, tokens: int) -> None:
        """See :meth:`KeyIndex.forget`: the means stay, as the clusters' representatives."""
        self.covered = min(self.covered, tokens)
        if self.labels is not None and self.means is not None and tokens < self.labels.shape[1]:
            self.labels = self.labels[:, :tokens]
            self.sizes = _counts(self.labels, self.means.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`KeyIndex.tensors`."""
        if self.labels is None or self.means is None or not self.covered:
            return {}
        return {"labels": self.labels, "means": self.means}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`KeyIndex.restore`."""
        self.labels, self.means = tensors["labels"], tensors["means"]
        self.sizes, self.covered = _counts(self.labels, self.means.shape[1]), self.labels.shape[1]

    def scores(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`KeyIndex.scores`: equation 1 of Squeezed Attention, the logarithm of a head's estimated share of
        attention per key, and the largest of a group's heads; no score (-inf) for empty clusters."""
        assert self.means is not None and self.sizes is not None, "no key is covered"
        logits = q @ self.means.float().transpose(1, 2)
        sizes = self.sizes.unsqueeze(1)
        share = logits - (logits + sizes.log()).logsumexp(-1, keepdim=True)
        return share.amax(1).masked_fill(self.sizes == 0, -math.inf), self.sizes

    def stored(self) -> chosen.Index | None:
        """See :meth:`KeyIndex.stored`."""
        if self.labels is None or self.means is None or self.sizes is None or not self.covered:
            return None
        return chosen.Index(self.means, self.sizes, self.labels, self.covered)

    def keys_of(self, chosen: Tensor) -> Tensor:
        """See :meth:`KeyIndex.keys_of`."""
        assert self.labels is not None, "no key is covered"
        return chosen.gather(1, self.labels.long())


def _counts(labels: Tensor, clusters: int) -> Tensor:
    """Keys of every cluster: (kv_heads, clusters) int32."""
    zeros = torch.zeros(labels.shape[0], clusters, dtype=torch.int32, device=labels.device)
    return zeros.scatter_add_(1, labels.long(), torch.ones_like(labels, dtype=torch.int32))
