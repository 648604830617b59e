"""APB (arXiv 2502.12085): every block sees the anchor, the pairs that earlier blocks pass on, and itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compressors import BlockView, Compressor
from ..distributed.collectives import Group, Pending
from ..kernels.attention import Part, Task
from ..kernels.merge import merge
from ..kernels.selection import choose, pack
from ..layers.base import AttentionInput
from ..planning.itinerary import Itinerary, Span
from ..planning.plan import Plan
from ..timing import timed
from .base import Strategy, Visible, blocks_visible


class APB(Strategy):
    """One all-gather a layer carries the anchor's shares and the selected pairs; a block's own part runs meanwhile.

    Gathered pairs are concatenated to [anchor | passed by block 0 | passed by block 1 | ...], and every block sees a
    prefix of them: the anchor and the pairs of the blocks before it (section 2 of the paper's method).
    """

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        # Pairs of every layer that are known so far, between rounds.
        self._known: dict[int, Tensor] = {}
        super().__init__(plan, group, compressor, backend)
        self._contexts = plan.contexts()

    def begin(self, itinerary: Itinerary) -> None:
        """See :meth:`Strategy.begin`."""
        super().begin(itinerary)
        plan, round = self.plan, itinerary.round
        # The place of each run of this round's new pairs in the gathered message: (rank, first pair, last + 1).
        self._pieces: list[tuple[int, int, int]] = []
        filled = [0] * plan.ranks
        shares = [plan.anchor_share(rank) for rank in range(plan.ranks)] if round == 0 else []
        counts = [(rank, stop - start) for rank, (start, stop) in enumerate(shares)]
        counts += [(block.rank, plan.passed(block.index)) for block in plan.all_blocks() if block.round == round]
        for rank, count in counts:
            self._pieces.append((rank, filled[rank], filled[rank] + count))
            filled[rank] += count
        self._width = max(filled)

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        pending = self._share(layer)
        if self.group.size > 1:
            self._attend_meanwhile(layer, pending, out)
            return
        # Nothing to wait for: one call for all rows.
        pairs = self._arrange(layer, pending.wait())
        tasks = [Task(*span.bounds, (*self._seen(span), self._itself(span, source=1))) for span in self.blocks]
        lse = None if layer.sinks is None else self._lse(layer, out)
        sources = [(pairs[0], pairs[1]), (layer.k, layer.v)]
        self.batched(layer, sources, [*tasks, *self._anchor_task()], out, lse)
        if lse is not None:
            self._settle(layer, out, lse, (*self.blocks, self.anchor))

    def _attend_meanwhile(self, layer: AttentionInput, pending: Pending, out: Tensor) -> None:
        """Blocks attend to themselves while pairs are on their way, then to the pairs; merged by log-sum-exp."""
        lse = self._lse(layer, out)
        others, others_lse = torch.empty_like(out), torch.empty_like(lse)
        own = [Task(*span.bounds, (self._itself(span, source=0),)) for span in self.blocks]
        self.batched(layer, [(layer.k, layer.v)], own, out, lse)
        with timed("communication"):
            gathered = pending.wait()
        pairs = self._arrange(layer, gathered)
        seeing = [span for span in self.blocks if self._contexts[span.block]]
        tasks = [*(Task(*span.bounds, self._seen(span)) for span in seeing), *self._anchor_task()]
        self.batched(layer, [(pairs[0], pairs[1])], tasks, others, others_lse)
        with timed("attention"):
            for span in seeing:
                rows = span.rows
                # No name for the merged rows: they would be alive while the next block's are.
                out[rows] = layer.settle(*merge((out[rows], others[rows]), (lse[:, rows], others_lse[:, rows])))
            if self.anchor:
                rows = self.anchor.rows
                out[rows] = layer.settle(others[rows], others_lse[:, rows])
        if layer.sinks is not None:
            self._settle(layer, out, lse, [span for span in self.blocks if span not in seeing])

    @staticmethod
    def _lse(layer: AttentionInput, out: Tensor) -> Tensor:
        return layer.q.new_empty(layer.q.shape[1], len(out), dtype=torch.float32)

    @staticmethod
    def _settle(layer: AttentionInput, out: Tensor, lse: Tensor, spans: Sequence[Span | None]) -> None:
        """Add the sinks to the softmax of rows that no merge has settled."""
        for span in spans:
            if span:
                out[span.rows] = layer.settle(out[span.rows], lse[:, span.rows])

    def visible(self, layer: AttentionInput) -> Visible:
        """See :meth:`Strategy.visible`: the anchor, the pairs that earlier blocks pass on, and the block itself."""
        counts = ((span, self.plan.passed(span.block)) for span in self.blocks)
        passed = {span.block: self.choose(layer, span, count) + span.start for span, count in counts if count}
        return blocks_visible(self.plan, passed)

    def _seen(self, span: Span) -> tuple[Part, ...]:
        """The prefix of the pairs (source 0) that a block's rows see; none for the first block."""
        seen = self._contexts[span.block]
        return (Part(0, 0, seen, causal=False),) if seen else ()

    def _itself(self, span: Span, source: int) -> Part:
        """A block as its own rows see it, in the layer's keys and values."""
        return Part(source, span.row, len(span), causal=True)

    def _anchor_task(self) -> list[Task]:
        """This share of the anchor's rows over the anchor, which they end: their alignment is the anchor's order."""
        return [Task(*self.anchor.bounds, (Part(0, 0, self.anchor.stop, causal=True),))] if self.anchor else []

    def _share(self, layer: AttentionInput) -> Pending:
        """Start to gather (2, kv_heads, pairs, head_dim) per rank: its anchor share, then its blocks' passed pairs."""
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
                with timed("selection"):
                    pack(layer.k[span.rows], layer.v[span.rows], chosen, packed[:, row : row + count])
                row += count
        return self.group.all_gather(message)

    def choose(self, layer: AttentionInput, span: Span, count: int) -> Tensor:
        """Rows (kv_heads, count) of a block that it passes on, counted from the block's first row, ascending."""
        block = self.plan.block(span.block)
        view = BlockView(
            layer=layer.index,
            block=block,
            k=layer.k[span.rows],
            v=layer.v[span.rows],
            q=layer.q[span.rows],
            query=layer.q[self.itinerary.query.rows],
            scale=layer.scale,
            passed=count,
            softcap=layer.softcap,
            before_rope=None if layer.before_rope is None else layer.before_rope[span.rows],
        )
        with timed("scoring"):
            scores = self.compressor.score(view)
        with timed("selection"):
            return choose(scores, count, self.plan.selectable(block), pooled=self.compressor.pooled)

    def _arrange(self, layer: AttentionInput, gathered: Tensor) -> Tensor:
        """All pairs known so far (2, pairs, kv_heads, head_dim), from (ranks, 2, kv_heads, pairs, head_dim)."""
        new = [gathered[rank, :, :, start:stop] for rank, start, stop in self._pieces]
        known = [self._known.pop(layer.index)] if self.itinerary.round else []
        pairs = torch.cat([*known, *new], 2)
        if not self.itinerary.last:
            self._known[layer.index] = pairs
        return pairs.transpose(1, 2)
