"""Squeezed attention: a token attends to the clusters of keys whose means promise it enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..planning.options import option
from .indexed import Indexed

if TYPE_CHECKING:
    from torch import Tensor

    from .selecting import Choose, KeyIndex


@dataclass(frozen=True)
class Squeezed(Indexed):
    """Squeezed Attention (arXiv 2411.09688), with one level of clusters: k-means on normalised keys by KV head.

    A cluster is attended to if the estimated share of attention per key is above a threshold, one for all KV heads of
    a layer, so that heads that look at few keys leave more to the others. It is calibrated to ``share`` on an answer's
    first token; later tokens attend to more or fewer keys. The heads of a group choose together.
    """

    name: ClassVar[str] = "squeezed"

    cluster_size: int = option(20, "Keys of a cluster, on average.", least=1)

    @property
    def index_key(self) -> tuple[str, int]:
        """See :attr:`Decoding.index_key`."""
        return Squeezed.name, self.cluster_size

    def new_index(self) -> KeyIndex:
        """See :meth:`Decoding.new_index`: clusters."""
        from .cluster_index import ClusterIndex

        return ClusterIndex(self.cluster_size)

    def chooser(self) -> Choose:
        """See :meth:`Indexed.chooser`: the threshold is calibrated anew for every answer."""
        return _Threshold()


class _Threshold:
    """Chooses the units above a layer's threshold, which its first row sets."""

    def __init__(self) -> None:
        self._of: dict[int, float] = {}

    def __call__(self, layer: int, scores: Tensor, sizes: Tensor, keys: int) -> Tensor:
        """See :data:`Choose`."""
        if layer not in self._of:
            best, order = scores.flatten().sort(descending=True, stable=True)
            within = int((sizes.flatten()[order].cumsum(0) <= keys * len(scores)).sum())
            self._of[layer] = float(best[max(within, 1) - 1]) if within < len(best) else -math.inf
        return (scores >= self._of[layer]) & (sizes > 0)
