"""Propagation: which rows go on above a layer, and their attention there, under every strategy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.collectives import Group
from ..kernels.scattered import scattered_window
from ..kernels.selection import attention_received
from ..layers.base import AttentionInput, LayerKind
from ..layers.routing import Router
from ..layers.shards import full_partial
from ..planning.plan import Plan
from ..timing import timed
from . import Strategy, make_strategy

# Tokens over which scores are max-pooled: those around a name or a code that the answer will copy. Until the answer has
# begun nothing looks at more than its beginning. Over the document, so that blocks and ranks do not matter.
_WIDEST = 127
# Of what goes on at least so many places of that width: a short text has room for fewer tokens around each.
_PLACES = 8


class Propagating:
    """The propagation of one prefill on one rank.

    Rows are chosen in its layer, in the last round; then :meth:`move` is called with everything that has rows, and the
    layers above have other rows.

    Attributes:
        layer: the last layer that all rows run through.
        positions: true positions of the prefix's and the document's tokens that go on; None before they are chosen.
    """

    def __init__(self, strategy: Strategy, everyone: Group) -> None:
        """``strategy``: that of the layers below. ``everyone``: all processes, those that share weights included."""
        plan = strategy.plan
        assert plan.propagation is not None and plan.propagation.layer is not None
        self.layer = plan.propagation.layer
        self.positions: Tensor | None = None
        self._below = strategy
        self._plan, self._above = plan, plan.above
        self._group, self._everyone = strategy.group, everyone
        self._strategy = make_strategy(self._above, self._group, strategy.compressor, strategy.backend)
        self._router = Router({LayerKind.FULL: self._strategy.attend, LayerKind.WINDOW: self._attend_window})
        # By number of a tensor in the order in which it is moved: the rows of earlier rounds.
        self._earlier: dict[int, list[Tensor]] = {}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """Prepare for a round."""
        self._moved.clear()

    def attend(self, layer: AttentionInput) -> Tensor:
        """Attention output (rows, heads, head_dim) of a layer, in q's dtype."""
        if layer.index > self.layer:
            # Before the last round nobody looks at what becomes of the rows above.
            return layer.q if self.positions is None else self._router(layer)
        out = self._below.attend(layer)
        if layer.index == self.layer and self._below.itinerary.last:
            self._choose(layer)
        return out

    def _choose(self, layer: AttentionInput) -> None:
        """Choose the rows that go on, by the attention of the question's rows in this layer; the same on all ranks."""
        with timed("scoring"):
            scores = self._everyone.sum(attention_to_document(self._below, layer))
        with timed("selection"):
            best = best_rows(scores, self._plan.going_on).cpu()
        self.positions = torch.cat([torch.arange(self._plan.prefix), best + self._plan.prefix])
        self._deal()

    def move(self, x: Tensor) -> Tensor:
        """The rows (1, rows, ...) that this rank takes above the layer, of (1, rows, ...) that it has below it.

        Between rounds the rows of blocks wait for the last one, and only the question's go on.
        """
        known = self._moved.get(id(x))
        if known is None:
            number = len(self._moved)
            known = self._moved[id(x)] = x, self._move(x, number)  # x is kept, so that its id stays its own
        return known[1]

    @property
    def kept(self) -> slice | None:
        """Rows above the layer whose keys and values the cache keeps; None before the last round."""
        return None if self.positions is None else self._strategy.itinerary.kept

    @property
    def kept_positions(self) -> tuple[range, ...]:
        """True positions of :attr:`kept`'s rows, in order."""
        if self.positions is None:
            return ()
        return self._kept_positions

    @property
    def held(self) -> int:
        """Tokens of prefix and document that this rank holds of a layer: below, or above once rows are chosen."""
        plan = self._plan if self.positions is None else self._above
        return sum(map(len, plan.owned(self._group.rank)))

    def _deal(self) -> None:
        """Find out which rows this rank sends and receives, and which it takes above the layer."""
        assert self.positions is not None
        rank, ranks = self._group.rank, range(self._plan.ranks)
        source = _owners(self._plan, self.positions)
        target = _owners(self._above, torch.arange(len(self.positions)))
        own = [torch.arange(0), *(torch.arange(block.start, block.stop) for block in self._plan.owned(rank))]
        rows = torch.searchsorted(torch.cat(own), self.positions)
        self._sent = [rows[(source == rank) & (target == other)] for other in ranks]
        senders = source[target == rank]
        self._received = [int((senders == other).sum()) for other in ranks]
        # Rows arrive sender by sender, in ascending order of each.
        self._order = senders.argsort(stable=True).argsort()
        places = self.positions[target == rank]
        # For windows, which are the same in every layer above.
        self._places: list[int] = places.tolist()
        self._everywhere: list[int] = self.positions.tolist()
        question = [range(self._plan.query_start, self._plan.total)] if self._strategy.itinerary.owns_tail else []
        self._kept_positions = (*_ranges(places), *question)
        # Of a message of all ranks' rows, rank by rank, where each row that went on is.
        self._arranged = target.argsort(stable=True).argsort()

    def _move(self, x: Tensor, number: int) -> Tensor:
        itinerary = self._below.itinerary
        blocks, query = x[0, itinerary.block_rows], x[0, itinerary.query.rows]
        if not itinerary.last:
            self._earlier.setdefault(number, []).append(blocks.clone())
            return query.unsqueeze(0)
        whole = torch.cat([*self._earlier.pop(number, []), blocks])
        parts = [whole[rows.to(x.device)] for rows in self._sent]
        with timed("communication"):
            received = self._group.all_to_all(parts, [(count, *whole.shape[1:]) for count in self._received])
        return torch.cat([torch.cat(received)[self._order.to(x.device)], query]).unsqueeze(0)

    def _attend_window(self, layer: AttentionInput) -> Tensor:
        """Rows see the keys in their window by position; every rank gathers the keys of all that went on."""
        assert layer.window is not None and self.positions is not None
        itinerary = self._strategy.itinerary
        own = itinerary.block_rows
        every = [sum(map(len, self._above.owned(rank))) for rank in range(self._above.ranks)]
        packed = layer.k.new_zeros(2, max(every), *layer.k.shape[1:])
        packed[0, : own.stop], packed[1, : own.stop] = layer.k[own], layer.v[own]
        with timed("communication"):
            gathered = self._group.all_gather(packed).wait()
        pairs = torch.cat([part[:, :count] for part, count in zip(gathered, every, strict=True)], 1)
        question = torch.stack([layer.k[itinerary.query.rows], layer.v[itinerary.query.rows]])
        k, v = torch.cat([pairs[:, self._arranged.to(pairs.device)], question], 1)
        asked = list(range(self._plan.query_start, self._plan.total))
        keys, rows = self._everywhere + asked, self._places + asked
        with timed("attention"):
            out, lse = scattered_window(layer.q, rows, k, v, keys, layer.window, layer.scale, layer.softcap)
        return layer.settle(out, lse).to(layer.q.dtype)


def attention_to_document(strategy: Strategy, layer: AttentionInput) -> Tensor:
    """(document,) fp32: the attention that the question's rows pay to each token of the document in a layer.

    Of the tokens that this rank holds, 0 for others; the mean over the question's rows, summed over this process's
    heads, with the normaliser over all ranks, which all call this in the last round.
    """
    plan, itinerary = strategy.plan, strategy.itinerary
    query, rows = strategy.of_query(layer)
    _, lse = full_partial(query, rows, strategy.backend)
    lse = strategy.group.all_gather(lse).wait().logsumexp(0)
    if layer.sinks is not None:
        lse = torch.logaddexp(lse, layer.sinks.float()[:, None])
    found = lse.new_zeros(plan.document)
    held: list[tuple[Tensor, Sequence[range]]] = []
    if layer.earlier is not None:
        held.append((layer.earlier[0], itinerary.earlier))
    held.append((layer.k[itinerary.block_rows], [range(span.start, span.stop) for span in itinerary.blocks]))
    for keys, places in held:
        if not len(keys):
            continue
        group = query.q.shape[1] // keys.shape[1]
        received = attention_received(query.q, keys, layer.scale, layer.softcap, lse).sum(0) * group
        for place, part in zip(places, received.split([len(place) for place in places]), strict=True):
            outside = max(plan.prefix - place.start, 0)
            found[place.start + outside - plan.prefix : place.stop - plan.prefix] = part[outside:]
    return found


def best_rows(scores: Tensor, count: int) -> Tensor:
    """Indices (count,) of the best pooled scores (document,), ascending."""
    width = min(count // _PLACES | 1, _WIDEST)
    pooled = F.max_pool1d(scores[None], width, 1, width // 2)[0]
    # Stable: of equal scores, which pooling makes, the earlier token's counts.
    return pooled.sort(descending=True, stable=True).indices[:count].sort().values


def _owners(plan: Plan, positions: Tensor) -> Tensor:
    """The rank that has each of these positions of prefix and document."""
    blocks = list(plan.all_blocks())
    starts = torch.tensor([block.start for block in blocks])
    ranks = torch.tensor([block.rank for block in blocks])
    return ranks[torch.searchsorted(starts, positions, right=True) - 1]


def _ranges(positions: Tensor) -> list[range]:
    """Ascending positions (count,) as runs of consecutive ones."""
    if not len(positions):
        return []
    ends = (positions.diff() != 1).nonzero().squeeze(1)
    starts = torch.cat([positions[:1], positions[ends + 1]]).tolist()
    stops = torch.cat([positions[ends], positions[-1:]]).tolist()
    return [range(start, stop + 1) for start, stop in zip(starts, stops, strict=True)]
