"""Fetching what a sliding window needs of other ranks' keys and values: one all-to-all a layer, of those alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.collectives import Group
from ..halo import Piece, pieces
from ..kernels.window import Run
from ..plan import Kind, Plan, Span


class Halos:
    """The exchange of one window size under one plan, for one rank."""

    def __init__(self, plan: Plan, group: Group, window: int) -> None:
        self._group = group
        self._spans = [span for span in plan.spans(group.rank) if span.kind is not Kind.QUERY and len(span)]
        every = pieces(plan, window)
        travelling = [piece for piece in every if piece.sender != piece.receiver]
        self._needed = [piece for piece in every if piece.receiver == group.rank]
        self._travels = bool(travelling)
        ranks = range(group.size)
        self._sent = [[p for p in travelling if (p.sender, p.receiver) == (group.rank, rank)] for rank in ranks]
        self._received = [[p for p in travelling if (p.receiver, p.sender) == (group.rank, rank)] for rank in ranks]

    def fetch(self, k: Tensor, v: Tensor) -> dict[Span, Run]:
        """For every span of this rank but the query's, the keys that its rows see: its halo and its own.

        k, v: (rows, kv_heads, head_dim) of this rank's rows.
        """
        arrived = self._exchange(k, v) if self._travels else {}
        runs = {}
        for span in self._spans:
            before = [piece for piece in self._needed if piece.span == span]
            keys, values = k[span.rows], v[span.rows]
            if before:
                halo = [arrived[piece] if piece in arrived else _rows(k, v, piece) for piece in before]
                keys, values = (torch.cat([*parts, own]) for *parts, own in zip(*halo, (keys, values), strict=True))
            runs[span] = Run(keys, values, before[0].start if before else span.start)
        return runs

    def _exchange(self, k: Tensor, v: Tensor) -> dict[Piece, Tensor]:
        """The pieces that other ranks hold: (2, keys, kv_heads, head_dim) each."""
        nothing = k.new_empty(2, 0, *k.shape[1:])  # there may be no piece for a rank
        parts = [torch.cat([nothing, *(_rows(k, v, piece) for piece in sent)], 1) for sent in self._sent]
        shapes = [(2, sum(map(len, received)), *k.shape[1:]) for received in self._received]
        messages = self._group.all_to_all(parts, shapes)
        return {
            piece: part
            for received, message in zip(self._received, messages, strict=True)
            for piece, part in zip(received, message.split([len(piece) for piece in received], 1), strict=True)
        }


def _rows(k: Tensor, v: Tensor, piece: Piece) -> Tensor:
    """A piece among this rank's own rows, keys and values: (2, keys, kv_heads, head_dim)."""
    rows = slice(piece.row, piece.row + len(piece))
    return torch.stack([k[rows], v[rows]])
