"""A strategy's attention in prefill: the rows of one rank in the layers that see everything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..compressors import Compressor
from ..distributed.collectives import Group
from ..errors import InputError
from ..kernels.attention import Segment, Task, attention, batched_attention
from ..layers.base import AttentionInput, LayerKind
from ..layers.routing import Router
from ..layers.shards import Merging, NewRows, full_partial, merge_over_ranks, window_partial
from ..layers.window import WindowLayers
from ..planning.itinerary import Itinerary, Span
from ..planning.plan import Plan
from ..timing import timed

# Called with (layer, block, true positions (kv_heads, count) of the pairs that the block passes on, ascending).
OnSelection = Callable[[int, int, Tensor], None]

# (KV head, its query heads, row positions (rows,), number of keys) -> bool (query heads or 1, rows, keys): True where a
# row of the document sees the key at a position, under full attention's causal order.
Visible = Callable[[int, slice, Tensor, int], Tensor]


class Strategy(ABC):
    """One method of prefill on one rank; subclasses compute attention of the document's rows in full-attention layers.

    Layers with a sliding window, and the query's rows in all layers, are attended alike under every strategy.
    """

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        self.plan = plan
        self.method = plan.method
        self.group = group
        self.compressor = compressor
        self.backend = backend
        self.on_selection: OnSelection | None = None
        # The query's rows of the layer that is being attended, while it is.
        self.question: Merging | None = None
        self.begin(plan.itinerary(group.rank, 0))

    def begin(self, itinerary: Itinerary) -> None:
        """Prepare for the rows of a round; the first is prepared by the constructor."""
        self.itinerary = itinerary
        self.blocks, self.anchor = itinerary.blocks, itinerary.anchor
        windows = WindowLayers(itinerary, self.group, self.backend)
        self._router = Router(
            {
                LayerKind.FULL: lambda layer: self._attend(layer, self.attend_document, full_partial),
                LayerKind.WINDOW: lambda layer: self._attend(layer, windows.attend_document, window_partial),
            }
        )

    def attend(self, layer: AttentionInput) -> Tensor:
        """Attention output (rows, heads, head_dim) of all rows of this rank, in q's dtype."""
        return self._router(layer)

    @abstractmethod
    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """Write the attention of the anchor's and the blocks' rows into ``out`` (rows, heads, head_dim)."""

    def visible(self, layer: AttentionInput) -> Visible:
        """The keys that the document's rows see in a layer, chosen anew from its input; all causal ones if exact.

        An approximate strategy must implement it for its fidelity to be measured.
        """
        if self.plan.exact:
            return causal
        raise InputError(
            f"The strategy {self.method.name!r} does not say which keys its rows see (Strategy.visible), "
            "so its fidelity cannot be measured; compare answers instead, with apb eval."
        )

    def _attend(
        self,
        layer: AttentionInput,
        attend_document: Callable[[AttentionInput, Tensor], None],
        partial: Callable[[AttentionInput, NewRows, str], tuple[Tensor, Tensor]],
    ) -> Tensor:
        out = layer.q.new_empty(layer.q.shape)  # contiguous, for the output projection
        self.question = self._start_query(layer, partial)
        attend_document(layer, out)
        out[self.itinerary.query.rows] = self.question.wait()
        self.question = None  # else the layer's q, k and v would be alive in the MLP
        return out

    def _start_query(
        self, layer: AttentionInput, partial: Callable[[AttentionInput, NewRows, str], tuple[Tensor, Tensor]]
    ) -> Merging:
        query, rows = self.of_query(layer)
        return merge_over_ranks(query, *partial(query, rows, self.backend), self.group)

    def of_query(self, layer: AttentionInput) -> tuple[AttentionInput, NewRows]:
        """A layer as the query's rows see it on this rank: over its shard."""
        itinerary = self.itinerary
        shard = itinerary.shard
        query = replace(layer, q=layer.q[itinerary.query.rows], k=layer.k[shard], v=layer.v[shard])
        return query, NewRows(itinerary.query.start, itinerary.shard_positions, itinerary.earlier)

    # -- for subclasses ----------------------------------------------------------------------------------------------

    def attention(self, layer: AttentionInput, q: Tensor, segments: list[Segment]) -> tuple[Tensor, Tensor]:
        """:func:`apb.attention` with this strategy's back-end and the layer's scale and cap."""
        with timed("attention"):
            return attention(q, segments, layer.scale, self.backend, layer.softcap)

    def batched(
        self,
        layer: AttentionInput,
        sources: Sequence[tuple[Tensor, Tensor]],
        tasks: Sequence[Task],
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        """:func:`apb.kernels.attention.batched_attention` of the layer's rows, likewise."""
        with timed("attention"):
            batched_attention(layer.q, sources, tasks, layer.scale, out, self.backend, lse, layer.softcap)

    def own(self, layer: AttentionInput, span: Span) -> Segment:
        """A block's keys and values as its own rows see them."""
        return Segment(layer.k[span.rows], layer.v[span.rows], causal=True)


def causal(kv_head: int, heads: slice, rows: Tensor, keys: int) -> Tensor:
    """:data:`Visible` of full attention."""
    return (torch.arange(keys, device=rows.device) <= rows[:, None]).unsqueeze(0)


def blocks_visible(plan: Plan, passed: Callable[[int, int], Tensor]) -> Visible:
    """:data:`Visible` of a method whose rows see the anchor, their own block, and pairs passed by earlier blocks.

    ``passed``: gives the true positions (count,) of the pairs of earlier blocks that (block, KV head) sees.
    """
    starts = [plan.block(index).start for index in range(plan.blocks)]

    def visible(kv_head: int, heads: slice, rows: Tensor, keys: int) -> Tensor:
        key = torch.arange(keys, device=rows.device)
        owner = torch.bucketize(rows, torch.tensor(starts, device=rows.device), right=True) - 1
        seen = key >= torch.tensor(starts, device=rows.device)[owner][:, None]
        if plan.blocks > 1:
            seen |= key < plan.anchored
        received = torch.zeros(plan.blocks, keys, dtype=torch.bool, device=rows.device)
        for index, mask in enumerate(received):
            mask[passed(index, kv_head).to(rows.device)] = True
        seen |= received[owner]
        return causal(kv_head, heads, rows, keys) & seen

    return visible
