"""Layers with a window, sliding or chunked, in prefill: exact under every strategy.

A row of the document sees exactly the keys in its window; those that other ranks hold are fetched as halos, by one
all-to-all per layer. The anchor's rows see the anchor alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed.collectives import Group
from ..kernels.window import Run
from ..planning.halo import Piece, pieces
from ..planning.itinerary import Itinerary, Kind, Span
from ..timing import timed
from .base import AttentionInput
from .shards import windowed


class WindowLayers:
    """The layers with a window in one round, on one rank."""

    def __init__(self, itinerary: Itinerary, group: Group, backend: str) -> None:
        self._itinerary = itinerary
        self._group = group
        self._backend = backend
        self._halos: dict[tuple[int, bool], Halos] = {}

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """Write the attention of the anchor's and the blocks' rows into ``out`` (rows, heads, head_dim)."""
        assert layer.window is not None
        window = layer.window, layer.chunked
        if window not in self._halos:
            self._halos[window] = Halos(self._itinerary, self._group, *window)
        with timed("communication"):
            runs = self._halos[window].fetch(layer.k, layer.v, layer.earlier)
        for span, run in runs.items():
            out[span.rows] = layer.settle(*windowed(layer, layer.q[span.rows], span.start, [run], self._backend))


class Halos:
    """The exchange of one kind of window in one round of a plan, for one rank."""

    def __init__(self, itinerary: Itinerary, group: Group, window: int, chunked: bool) -> None:
        self._group = group
        self._spans = [span for span in itinerary.spans if span.kind is not Kind.QUERY and len(span)]
        every = pieces(itinerary.plan, window, itinerary.round, chunked)
        travelling = [piece for piece in every if piece.sender != piece.receiver]
        self._needed = [piece for piece in every if piece.receiver == group.rank]
        self._travels = bool(travelling)
        ranks = range(group.size)
        self._sent = [[p for p in travelling if (p.sender, p.receiver) == (group.rank, rank)] for rank in ranks]
        self._received = [[p for p in travelling if (p.receiver, p.sender) == (group.rank, rank)] for rank in ranks]

    def fetch(self, k: Tensor, v: Tensor, earlier: tuple[Tensor, Tensor] | None) -> dict[Span, Run]:
        """For every span of this rank but the query's, the keys that its rows see: its halo and its own.

        k, v: (rows, kv_heads, head_dim) of this rank's rows. earlier: the same of its blocks of earlier rounds.
        """

        def rows(piece: Piece) -> Tensor:
            """A piece that this rank holds, keys and values: (2, keys, kv_heads, head_dim)."""
            held = slice(piece.row, piece.row + len(piece))
            if piece.early:
                assert earlier is not None
                return torch.stack([earlier[0][held], earlier[1][held]])
            return torch.stack([k[held], v[held]])

        arrived = self._exchange(rows, k.new_empty(2, 0, *k.shape[1:])) if self._travels else {}
        runs = {}
        for span in self._spans:
            before = [piece for piece in self._needed if piece.span == span]
            keys, values = k[span.rows], v[span.rows]
            if before:
                halo = [arrived[piece] if piece in arrived else rows(piece) for piece in before]
                keys, values = (torch.cat([*parts, own]) for *parts, own in zip(*halo, (keys, values), strict=True))
            runs[span] = Run(keys, values, before[0].start if before else span.start)
        return runs

    def _exchange(self, rows: Callable[[Piece], Tensor], nothing: Tensor) -> dict[Piece, Tensor]:
        """The pieces that other ranks hold: (2, keys, kv_heads, head_dim) each. ``nothing``: an empty piece."""
        parts = [torch.cat([nothing, *(rows(piece) for piece in sent)], 1) for sent in self._sent]
        shapes = [(2, sum(map(len, received)), *nothing.shape[2:]) for received in self._received]
        messages = self._group.all_to_all(parts, shapes)
        return {
            piece: part
            for received, message in zip(self._received, messages, strict=True)
            for piece, part in zip(received, message.split([len(piece) for piece in received], 1), strict=True)
        }
