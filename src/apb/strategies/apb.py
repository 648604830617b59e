"""APB (arXiv 2502.12085): every block sees the anchor, what earlier blocks pass on, and itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compressors import BlockView, Compressor
from ..distributed.collectives import Group, Pending
from ..kernels.attention import Part, Segment, Task, attend
from ..kernels.merge import merge
from ..kernels.selection import choose, pack
from ..parts import part
from ..planning.plan import Plan, Span
from .base import Layer, Strategy


class APB(Strategy):
    """One all-gather a layer carries the anchor's shares and the selected pairs; a block's own part runs meanwhile.

    What is gathered becomes one run of pairs [anchor | passed by block 0 | passed by block 1 | ...], of which every
    block sees a leading part: the anchor and what the blocks before it passed on (section 2 of the paper's method).
    """

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        super().__init__(plan, group, compressor, backend)
        self._contexts = plan.contexts()
        # The run of every layer, as far as it is known, between rounds.
        self._runs: dict[int, Tensor] = {}

    def begin(self, round: int) -> None:
        """See :meth:`Strategy.begin`."""
        super().begin(round)
        plan = self.plan
        # Where each piece that this round adds to that run lies in the gathered message: (rank, first pair, last + 1).
        self._pieces: list[tuple[int, int, int]] = []
        filled = [0] * plan.ranks
        shares = [plan.anchor_share(rank) for rank in range(plan.ranks)] if round == 0 else []
        counts = [(rank, stop - start) for rank, (start, stop) in enumerate(shares)]
        counts += [(block.rank, plan.passed(block.index)) for block in plan.all_blocks() if block.round == round]
        for rank, count in counts:
            self._pieces.append((rank, filled[rank], filled[rank] + count))
            filled[rank] += count
        self._width = max(filled)

    def attend_document(self, layer: Layer, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        pending = self._share(layer)
        if not layer.plain:
            self._attend_by_span(layer, pending, out)
        elif self.group.size == 1:  # nothing to wait for: one call for all rows
            pairs = self._arrange(layer, pending.wait())
            tasks = [Task(*span.bounds, (*self._seen(span), self._itself(span, source=1))) for span in self.blocks]
            with part("attention"):
                sources = [(pairs[0], pairs[1]), (layer.k, layer.v)]
                attend(layer.q, sources, [*tasks, *self._anchor_task()], layer.scale, out, self.backend)
        else:
            self._attend_meanwhile(layer, pending, out)

    def _attend_meanwhile(self, layer: Layer, pending: Pending, out: Tensor) -> None:
        """What needs no other rank while pairs are on their way, then the rest, merged by log-sum-exp."""
        lse = layer.q.new_empty(layer.q.shape[1], len(out), dtype=torch.float32)
        others, others_lse = torch.empty_like(out), torch.empty_like(lse)
        own = [Task(*span.bounds, (self._itself(span, source=0),)) for span in self.blocks]
        with part("attention"):
            attend(layer.q, [(layer.k, layer.v)], own, layer.scale, out, self.backend, lse)
        with part("communication"):
            gathered = pending.wait()
        pairs = self._arrange(layer, gathered)
        seeing = [span for span in self.blocks if self._contexts[span.block]]
        tasks = [*(Task(*span.bounds, self._seen(span)) for span in seeing), *self._anchor_task()]
        with part("attention"):
            attend(layer.q, [(pairs[0], pairs[1])], tasks, layer.scale, others, self.backend, others_lse)
            for span in seeing:
                rows = span.rows
                # No name for what was merged: it would be alive while the next block's is.
                out[rows] = merge((out[rows], others[rows]), (lse[:, rows], others_lse[:, rows]))[0]
            if self.anchor:
                out[self.anchor.rows] = others[self.anchor.rows]

    def _attend_by_span(self, layer: Layer, pending: Pending, out: Tensor) -> None:
        """Layers that cap logits or have sinks."""
        own = [self.attention(layer, layer.q[span.rows], [self.own(layer, span)]) for span in self.blocks]
        with part("communication"):
            gathered = pending.wait()
        pairs = self._arrange(layer, gathered)
        for span, (alone, lse) in zip(self.blocks, own, strict=True):
            others, others_lse = self.attention(layer, layer.q[span.rows], self._context(pairs, span))
            with part("attention"):
                out[span.rows] = layer.settle(*merge((alone, others), (lse, others_lse)))
        if self.anchor:
            # This share's rows end where the segment ends, so the bottom-right alignment is the anchor's own order.
            segment = Segment(pairs[0, : self.anchor.stop], pairs[1, : self.anchor.stop], causal=True)
            out[self.anchor.rows] = layer.settle(*self.attention(layer, layer.q[self.anchor.rows], [segment]))

    def _seen(self, span: Span) -> tuple[Part, ...]:
        """The leading part of the run, source 0, that a block's rows see; none for the first block."""
        seen = self._contexts[span.block]
        return (Part(0, 0, seen, causal=False),) if seen else ()

    def _itself(self, span: Span, source: int) -> Part:
        """A block as its own rows see it, in the layer's keys and values."""
        return Part(source, span.row, len(span), causal=True)

    def _anchor_task(self) -> list[Task]:
        """This share of the anchor's rows over the anchor, which they end: their alignment is the anchor's order."""
        return [Task(*self.anchor.bounds, (Part(0, 0, self.anchor.stop, causal=True),))] if self.anchor else []

    def _share(self, layer: Layer) -> Pending:
        """Start to gather (2, kv_heads, pairs, head_dim) of every rank: its anchor share, then what its blocks pass."""
        _, kv_heads, head_dim = layer.k.shape
        message = layer.k.new_empty(2, kv_heads, self._width, head_dim)
        packed = message.transpose(1, 2)
        row = 0
        if self.anchor:
            row = len(self.anchor)
            packed[0, :row], packed[1, :row] = layer.k[self.anchor.rows], layer.v[self.anchor.rows]
        for span in self.blocks:
            count = self.plan.passed(span.block)
            if count:
                chosen = self.choose(layer, span, count)
                if self.on_selection is not None:
                    self.on_selection(layer.index, span.block, chosen + span.start)
                with part("selection"):
                    pack(layer.k[span.rows], layer.v[span.rows], chosen, packed[:, row : row + count])
                row += count
        return self.group.all_gather(message)

    def choose(self, layer: Layer, span: Span, count: int) -> Tensor:
        """Rows (kv_heads, count) of a block that it passes on, counted from the block's first row, ascending."""
        block = self.plan.block(span.block)
        view = BlockView(
            layer=layer.index,
            block=block,
            k=layer.k[span.rows],
            v=layer.v[span.rows],
            query=layer.q[self.query.rows],
            scale=layer.scale,
            passed=count,
            softcap=layer.softcap,
            before_rope=None if layer.before_rope is None else layer.before_rope[span.rows],
        )
        with part("scoring"):
            scores = self.compressor.score(view)
        with part("selection"):
            return choose(scores, count, self.plan.selectable(block), pooled=self.compressor.pooled)

    def _arrange(self, layer: Layer, gathered: Tensor) -> Tensor:
        """The run (2, pairs, kv_heads, head_dim) as blocks see it, from (ranks, 2, kv_heads, pairs, head_dim)."""
        new = [gathered[rank, :, :, start:stop] for rank, start, stop in self._pieces]
        known = [self._runs.pop(layer.index)] if self.round else []
        run = torch.cat([*known, *new], 2)
        if not self.last_round:
            self._runs[layer.index] = run
        return run.transpose(1, 2)

    def _context(self, pairs: Tensor, span: Span) -> list[Segment]:
        """Anchor and passing block of one block: a leading part of the run."""
        seen = self._contexts[span.block]
        return [Segment(pairs[0, :seen], pairs[1, :seen])] if seen else []
