"""A decode method that the package does not know: a token attends to the shard's first and last keys alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apb import Segment, attention
from apb.decoding import Decoding, Reader, Shard
from apb.layers.base import AttentionInput
from apb.layers.shards import NewRows
from apb.methods import option


@dataclass(frozen=True)
class Nearest(Decoding):
    """The first key and the ``last`` keys of each rank's shard."""

    name: ClassVar[str] = "nearest"

    last: int = option(16, "Keys at a shard's end that a token attends to.", least=1)

    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        held = {layer: len(cache.shard(layer)[0]) for layer in cache.indices}
        return NearestReader(self.last, held)


class NearestReader(Reader):
    """Over one rank's shard."""

    def __init__(self, last: int, held: dict[int, int]) -> None:
        self.last, self.held = last, held
        self.share = min((last + 1) / max(*held.values(), 1), 1.0)

    def attend(self, layer: AttentionInput, rows: NewRows) -> tuple[Tensor, Tensor]:
        keys = len(layer.k)
        assert keys >= self.held[layer.index], "a shard does not shrink"
        first = slice(0, min(1, max(keys - self.last, 0)))
        last = slice(max(keys - self.last, 0), keys)
        own = rows.holds_own(len(layer.q))
        segments = [Segment(layer.k[first], layer.v[first]), Segment(layer.k[last], layer.v[last], causal=own)]
        return attention(layer.q, segments, layer.scale)
