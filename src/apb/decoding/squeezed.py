"""Squeezed attention: a token attends to the clusters of keys whose means promise it enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..planning.options import option
from .indexed import Indexed

if TYPE_CHECKING:
    from torch import Tensor

    from .base import StoredReader
    from .selecting import KeyIndex


@dataclass(frozen=True)
class Squeezed(Indexed):
    """Squeezed Attention (arXiv 2411.09688), with one level of clusters: k-means on normalised keys by KV head.

    A cluster is attended to if the estimated share of attention per key is above a threshold, one for all KV heads of
    a layer, so that heads that look at few keys leave more to the others. The paper calibrates it once, for a mean over
    many texts; here every token has its own, which ``share`` of the keys pass. The heads of a group choose together.
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

    def choose(self, scores: Tensor, sizes: Tensor, keys: int) -> Tensor:
        """See :meth:`Indexed.choose`: the best clusters of all KV heads together."""
        from ..kernels.chosen import within

        return within(scores.flatten().unsqueeze(0), sizes.flatten().unsqueeze(0), keys * len(scores)).view_as(scores)

    def stored_reader(self) -> StoredReader:
        """See :meth:`Decoding.stored_reader`."""
        from .stored import SelectingStoredReader

        return SelectingStoredReader(None, together=True)
