"""Fetching what a sliding window needs of other ranks' keys and values: one all-to-all a layer, of those alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed.collectives import Group
from ..kernels.window import Run
from ..planning.halo import Piece, pieces
from ..planning.plan import Kind, Plan, Span


class Halos:
    """The exchange of one window size in one round of a plan, for one rank."""

    def __init__(self, plan: Plan, group: Group, window: int, round: int) -> None:
        self._group = group
        self._spans = [span for span in plan.spans(group.rank, round) if span.kind is not Kind.QUERY and len(span)]
        every = pieces(plan, window, round)
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
        """The pieces that other ranks hold: (2, keys, kv_heads, head_dim) each. ``nothing``: what an empty one is."""
        parts = [torch.cat([nothing, *(rows(piece) for piece in sent)], 1) for sent in self._sent]
        shapes = [(2, sum(map(len, received)), *nothing.shape[2:]) for received in self._received]
        messages = self._group.all_to_all(parts, shapes)
        return {
            piece: part
            for received, message in zip(self._received, messages, strict=True)
            for piece, part in zip(received, message.split([len(piece) for piece in received], 1), strict=True)
        }
