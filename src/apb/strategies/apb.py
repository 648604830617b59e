"""APB (arXiv 2502.12085): every block sees the anchor, the pairs that earlier blocks pass on, and itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compressors import BlockView, Compressor
from ..distributed.collectives import Group, Pending
from ..kernels.attention import Part, Task
from ..kernels.merge import merge, merge_into
from ..kernels.selection import choose, pack, pool
from ..layers.base import AttentionInput
from ..layers.shards import full_partial
from ..planning.itinerary import Itinerary, Span
from ..planning.plan import Plan
from ..timing import timed
from .base import Strategy, Visible, blocks_visible
from .contest import Contest, kept


@dataclass(frozen=True)
class Passed:
    """What the blocks of a round see beside themselves: sources of keys and values, and by block its parts of them."""

    sources: list[tuple[Tensor, Tensor]]
    parts: dict[int, tuple[Part, ...]]


class APB(Strategy):
    """One all-gather a layer carries the anchor's shares and the selected pairs; a block's own part runs meanwhile.

    Gathered pairs are concatenated to [anchor | passed by block 0 | passed by block 1 | ...], and every block sees a
    prefix of them: the anchor and the pairs of the blocks before it (section 2 of the paper's method). Where these are
    more than the budget their scores are gathered too, and a block sees the anchor and the best.
    """

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        # Pairs of every layer that are known so far and, where they compete, their scores: between rounds.
        self._known: dict[int, list[Tensor]] = {}
        # Log-sum-exps of the query's rows in every layer, of the first round: the scores of all rounds share a measure.
        self._measures: dict[int, Tensor] = {}
        self._contexts = plan.contexts()
        self._budget = plan.competing
        super().__init__(plan, group, compressor, backend)

    def begin(self, itinerary: Itinerary) -> None:
        """See :meth:`Strategy.begin`."""
        super().begin(itinerary)
        plan, round = self.plan, itinerary.round
        # The place of each run of this round's new pairs in the gathered message: (rank, first pair, last + 1).
        self._pieces: list[tuple[int, int, int]] = []
        filled = [0] * plan.ranks
        shares = [plan.anchor_share(rank) for rank in range(plan.ranks)] if round == 0 else []
        counts = [(rank, stop - start) for rank, (start, stop) in enumerate(shares)]
        self._offering = {block.index: plan.passed(block.index) for block in plan.all_blocks() if block.round == round}
        counts += [(plan.block(index).rank, count) for index, count in self._offering.items()]
        for rank, count in counts:
            self._pieces.append((rank, filled[rank], filled[rank] + count))
            filled[rank] += count
        self._width = max(filled)
        self._contest = None if self._budget is None else self._contest_of(itinerary, self._budget)

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        pending = self._share(layer)
        if self.group.size > 1:
            self._attend_meanwhile(layer, pending, out)
            return
        # Nothing to wait for: one call for all rows.
        passed = self._arrange(layer, [each.wait() for each in pending])
        own = len(passed.sources)
        tasks = [Task(*span.bounds, (*passed.parts[span.block], self._itself(span, own))) for span in self.blocks]
        lse = None if layer.sinks is None else self._lse(layer, out)
        self.batched(layer, [*passed.sources, (layer.k, layer.v)], [*tasks, *self._anchor_task()], out, lse)
        if lse is not None:
            self._settle(layer, out, lse, (*self.blocks, self.anchor))

    def _attend_meanwhile(self, layer: AttentionInput, pending: Sequence[Pending], out: Tensor) -> None:
        """Blocks attend to themselves while pairs are on their way, then to the pairs; merged by log-sum-exp."""
        lse = self._lse(layer, out)
        others, others_lse = torch.empty_like(out), torch.empty_like(lse)
        own = [Task(*span.bounds, (self._itself(span, source=0),)) for span in self.blocks]
        self.batched(layer, [(layer.k, layer.v)], own, out, lse)
        with timed("communication"):
            gathered = [each.wait() for each in pending]
        passed = self._arrange(layer, gathered)
        seeing = [span for span in self.blocks if passed.parts[span.block]]
        tasks = [*(Task(*span.bounds, passed.parts[span.block]) for span in seeing), *self._anchor_task()]
        self.batched(layer, passed.sources, tasks, others, others_lse)
        with timed("attention"):
            for rows in (span.rows for span in seeing):  # block by block: on a CPU their copies in fp32 are small
                if layer.sinks is None:
                    merge_into(out[rows], lse[:, rows], others[rows], others_lse[:, rows])
                else:  # rounded after the sinks alone
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
        """See :meth:`Strategy.visible`: the anchor, pairs that earlier blocks pass on, and the block itself."""
        anchor, offers = self.plan.anchor_length, self._offers(layer)
        empty = torch.empty(layer.k.shape[1], 0, dtype=torch.int64, device=layer.k.device)
        positions = torch.cat([empty, *(rows + span.start for span, rows, _ in offers)], 1)
        scores = [each for _, _, each in offers if each is not None]
        # As gathered pairs are: the anchor's before the blocks'.
        chosen: dict[int, Tensor] = {}
        if self._contest and scores:
            columns = self._compete(self._contest, F.pad(torch.cat(scores, 1), (anchor, 0)))
            chosen = dict(zip(self._contest.blocks, columns, strict=True))

        def seen(block: int, kv_head: int) -> Tensor:
            if block in chosen:
                return positions[kv_head, chosen[block][kv_head] - anchor]
            return positions[kv_head, : max(self._contexts[block] - anchor, 0)]

        return blocks_visible(self.plan, seen)

    def _itself(self, span: Span, source: int) -> Part:
        """A block as its own rows see it, in the layer's keys and values."""
        return Part(source, span.row, len(span), causal=True)

    def _anchor_task(self) -> list[Task]:
        """This share of the anchor's rows over the anchor, which they end: their alignment is the anchor's order."""
        return [Task(*self.anchor.bounds, (Part(0, 0, self.anchor.stop, causal=True),))] if self.anchor else []

    def _share(self, layer: AttentionInput) -> list[Pending]:
        """Start to gather (2, kv_heads, pairs, head_dim) per rank: its anchor share, then its blocks' passed pairs.

        Where pairs compete their scores (1, kv_heads, pairs, 1) fp32 follow; those of the anchor are not read.
        """
        _, kv_heads, head_dim = layer.k.shape
        message = layer.k.new_empty(2, kv_heads, self._width, head_dim)
        packed, messages = message.transpose(1, 2), [message]
        if self._budget is not None:
            messages.append(layer.k.new_zeros(1, kv_heads, self._width, 1, dtype=torch.float32))
        row = 0
        if self.anchor:
            row = len(self.anchor)
            packed[0, :row], packed[1, :row] = layer.k[self.anchor.rows], layer.v[self.anchor.rows]
        offers = self._offers(layer)
        if self.on_selection is not None:
            for span, chosen, _ in offers:
                self.on_selection(layer.index, span.block, chosen + span.start)
        if offers:
            with timed("selection"):
                rows = torch.cat([chosen + span.row for span, chosen, _ in offers], 1)
                pack(layer.k, layer.v, rows, packed[:, row : row + rows.shape[1]])
                scores = [each for _, _, each in offers if each is not None]
                if scores:
                    messages[1][0, :, row : row + rows.shape[1], 0] = torch.cat(scores, 1)
        return [self.group.all_gather(each) for each in messages]

    def _offers(self, layer: AttentionInput) -> list[tuple[Span, Tensor, Tensor | None]]:
        """This rank's blocks that pass pairs on: the rows of these (kv_heads, count), ascending, and their scores.

        Rows are counted from the block's first. Scores are None unless pairs compete.
        """
        # Of the first round also where this rank has no block in it.
        measure = None if self._budget is None else self._measure(layer)
        spans = [span for span in self.blocks if self.plan.passed(span.block)]
        views = [self._view(layer, span, measure) for span in spans]
        with timed("scoring"):
            scores = self.compressor.score_all(views)
        with timed("selection"):
            chosen = self._choose(views, scores)
        if self._budget is None:
            return [(span, rows, None) for span, rows in zip(spans, chosen, strict=True)]
        with timed("scoring"):
            competing = self._competing(self.compressor.compare_all(views, scores), chosen)
        return list(zip(spans, chosen, competing, strict=True))

    def _competing(self, compared: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[Tensor]:
        """The comparable scores (kv_heads, count) of each block's chosen rows; of blocks of one shape in one call."""
        found: list[Tensor] = []
        for _, pairs in groupby(zip(compared, chosen, strict=True), key=lambda pair: [x.shape for x in pair]):
            scores, rows = zip(*pairs, strict=True)
            together = torch.cat(scores)
            together = pool(together) if self.compressor.pooled else together
            found += together.gather(1, torch.cat(rows)).split(len(rows[0]))
        return found

    def _view(self, layer: AttentionInput, span: Span, measure: Tensor | None) -> BlockView:
        """A block as the compressor sees it."""
        return BlockView(
            layer=layer.index,
            block=self.plan.block(span.block),
            k=layer.k[span.rows],
            v=layer.v[span.rows],
            q=layer.q[span.rows],
            query=layer.q[self.itinerary.query.rows],
            scale=layer.scale,
            passed=self.plan.passed(span.block),
            softcap=layer.softcap,
            lse=measure,
            before_rope=None if layer.before_rope is None else layer.before_rope[span.rows],
        )

    def _choose(self, views: Sequence[BlockView], scores: Sequence[Tensor]) -> list[Tensor]:
        """The rows (kv_heads, count) of each block with the best scores; of blocks of one shape in one call."""

        def shape(pair: tuple[BlockView, Tensor]) -> tuple[int, int, int]:
            view, own = pair
            return own.shape[1], view.passed, self.plan.selectable(view.block)

        found: list[Tensor] = []
        for (_, count, selectable), pairs in groupby(zip(views, scores, strict=True), key=shape):
            alike = [own for _, own in pairs]
            together = choose(torch.cat(alike), count, selectable, pooled=self.compressor.pooled)
            found += together.split(len(alike[0]))
        return found

    def _measure(self, layer: AttentionInput) -> Tensor:
        """Log-sum-exps (heads, rows) of the query's rows over all that is read in the first round, and the query."""
        if layer.index not in self._measures:
            question = self.question or self._start_query(layer, full_partial)
            self._measures[layer.index] = question.merged[1]
        return self._measures[layer.index]

    def _arrange(self, layer: AttentionInput, gathered: Sequence[Tensor]) -> Passed:
        """What the blocks see of pairs and scores, gathered from all ranks as :meth:`_share` gives them."""
        known = self._known.pop(layer.index) if self.itinerary.round else [None] * len(gathered)
        joined = []
        for earlier, each in zip(known, gathered, strict=True):
            new = [each[rank, :, :, start:stop] for rank, start, stop in self._pieces]
            joined.append(torch.cat(new if earlier is None else [earlier, *new], 2))
        if self._budget is not None:
            return self._limited(layer, *joined)
        if not self.itinerary.last:
            self._known[layer.index] = joined
        keys, values = joined[0].transpose(1, 2)
        return Passed([(keys, values)], {span.block: _prefix(self._contexts[span.block]) for span in self.blocks})

    def _limited(self, layer: AttentionInput, pairs: Tensor, scores: Tensor) -> Passed:
        """The same where pairs compete: a prefix as long as all that was offered fits, then copies of the best."""
        anchor, contest = self.plan.anchor_length, self._contest
        assert contest is not None
        keys, values = pairs.transpose(1, 2)
        sources, parts = [(keys, values)], {span.block: _prefix(self._contexts[span.block]) for span in self.blocks}
        with timed("selection"):
            columns = self._compete(contest, scores[0, :, :, 0])
            seeing = [block for block in contest.blocks if block in parts]
            if seeing:
                # (kv_heads, blocks * budget): block by block, as they are packed.
                chosen = columns[: len(seeing)].transpose(0, 1).flatten(1).contiguous()
                best = pairs.new_empty(2, pairs.shape[1], chosen.shape[1], pairs.shape[3]).transpose(1, 2)
                pack(keys, values, chosen, best)
                sources.append((best[0], best[1]))
                for number, block in enumerate(seeing):
                    first = number * contest.budget
                    parts[block] = (*_prefix(anchor), Part(1, first, contest.budget, causal=False))
            if not self.itinerary.last:
                last = columns[-1] if contest.blocks else None
                self._known[layer.index] = [kept(each, anchor, last) for each in (pairs, scores)]
        return Passed(sources, parts)

    def _compete(self, contest: Contest, scores: Tensor) -> Tensor:
        """By block of a contest the columns (kv_heads, budget) of the pairs that it sees, of ``scores`` (kv_heads,
        pairs): the anchor's, which are not read, those of earlier rounds, and those offered in this one."""
        anchor = self.plan.anchor_length
        return contest.columns(scores[:, anchor:]) + anchor

    def _contest_of(self, itinerary: Itinerary, budget: int) -> Contest:
        """Of this rank's blocks in a round those that see the best pairs, and before another round, what is kept."""
        mine = {span.block for span in itinerary.blocks}
        end = sum(self.plan.passed(block.index) for block in self.plan.all_blocks() if block.round < itinerary.round)
        end, edge = min(end, budget), 0
        found = []
        for block, count in self._offering.items():
            found.append((block, end, edge))
            end, edge = end + count, self.compressor.edge(min(count, budget))
        found = [each for each in found if each[0] in mine]
        if not itinerary.last:
            found.append((-1, end, edge))
        found = [each for each in found if each[1] > budget]
        blocks, ends, edges = zip(*found, strict=True) if found else ((), (), ())
        return Contest(blocks, ends, edges, budget)


def _prefix(pairs: int) -> tuple[Part, ...]:
    """The first so many pairs of the first source; none for the first block."""
    return (Part(0, 0, pairs, causal=False),) if pairs else ()
