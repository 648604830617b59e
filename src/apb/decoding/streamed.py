"""Exact decode over keys and values in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import RECENT, Decoding, Reader, Shard


@dataclass(frozen=True)
class Streamed(Decoding):
    """Every token attends to every key. Keys and values are in host memory but for the last ones, and pass through the
    device layer by layer: the baseline of :class:`Retrieval`."""

    name: ClassVar[str] = "streamed"
    exact: ClassVar[bool] = True
    offloads: ClassVar[bool] = True

    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        """See :meth:`Decoding.prepare`: what has been read moves to host memory."""
        from .dense import DenseReader

        self.build(cache)
        return DenseReader(cache, backend)

    def build(self, cache: Shard) -> None:
        """See :meth:`Decoding.build`: the move."""
        cache.move_away(RECENT)
