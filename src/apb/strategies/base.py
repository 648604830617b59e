"""What a strategy is: the attention of one layer over one rank's rows, in prefill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compressors import Compressor
from ..distributed.collectives import Group, Pending
from ..kernels.attention import Segment, attention
from ..kernels.merge import merge
from ..parts import part
from ..plan import Kind, Plan, Span

# Called with (layer, block, true positions (kv_heads, count) of the pairs that the block passes on, ascending).
OnSelection = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Layer:
    """One layer's input to attention, in this rank's row order.

    Attributes:
        index: index of the layer.
        q: (rows, heads, head_dim), after RoPE.
        k, v: (rows, kv_heads, head_dim), after RoPE, not repeated over the group.
        scale: factor on q.k.
        before_rope: (rows, (heads + 2 kv_heads) * head_dim), q, k, v before RoPE; None unless the compressor needs it.
        earlier: keys and values (tokens, kv_heads, head_dim) that this rank's cache holds of earlier rounds; None in
            the first.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    before_rope: Tensor | None = None
    earlier: tuple[Tensor, Tensor] | None = None


class Strategy(ABC):
    """One method of prefill on one rank. Subclasses attend the document's rows; the query's rows are alike for all."""

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        self.plan = plan
        self.group = group
        self.compressor = compressor
        self.backend = backend
        self.on_selection: OnSelection | None = None
        self.begin(0)

    def begin(self, round: int) -> None:
        """Get ready for the rows of a round; the first is ready from the start."""
        self.round = round
        self.spans = self.plan.spans(self.group.rank, round)
        self.blocks = [span for span in self.spans if span.kind is Kind.BLOCK]
        self.query = next(span for span in self.spans if span.kind is Kind.QUERY)
        self.anchor = next((span for span in self.spans if span.kind is Kind.ANCHOR), None)

    @property
    def last_round(self) -> bool:
        """Whether no round follows."""
        return self.round == self.plan.rounds - 1

    @property
    def cached_rows(self) -> slice:
        """The rows whose keys and values stay: this rank's blocks and, on the tail rank at last, the query."""
        return self._shard_rows(self._owns_tail and self.last_round)

    def _shard_rows(self, with_query: bool) -> slice:
        start = len(self.anchor) if self.anchor else 0
        return slice(start, self.query.rows.stop if with_query else self.query.row)

    @property
    def _owns_tail(self) -> bool:
        return self.group.rank == self.plan.tail_rank

    def attend(self, layer: Layer) -> Tensor:
        """Attention output (rows, heads, head_dim) of all rows of this rank, in q's dtype."""
        out = torch.empty_like(layer.q)
        query = self._start_query(layer)
        self.attend_document(layer, out)
        out[self.query.rows] = query.wait()
        return out

    @abstractmethod
    def attend_document(self, layer: Layer, out: Tensor) -> None:
        """Write the attention of the anchor's and the blocks' rows into ``out`` (rows, heads, head_dim)."""

    def _start_query(self, layer: Layer) -> Merging:
        rows = self._shard_rows(self._owns_tail)
        segments = [Segment(layer.k[rows], layer.v[rows], causal=self._owns_tail)]
        if layer.earlier is not None:
            segments.insert(0, Segment(*layer.earlier))
        return attend_shards(
            layer.q[self.query.rows], segments, scale=layer.scale, group=self.group, backend=self.backend
        )

    def attention(self, q: Tensor, segments: list[Segment], scale: float) -> tuple[Tensor, Tensor]:
        """:func:`apb.attention` with this strategy's back-end."""
        with part("attention"):
            return attention(q, segments, scale, self.backend)

    def own(self, layer: Layer, span: Span) -> Segment:
        """A block's keys and values as its own rows see them."""
        return Segment(layer.k[span.rows], layer.v[span.rows], causal=True)


@dataclass
class Merging:
    """Rows whose partial results are on their way from all ranks; ``wait`` merges them."""

    pending: Pending
    dtype: torch.dtype

    def wait(self) -> Tensor:
        """The merged output (rows, heads, head_dim), the same on every rank."""
        with part("communication"):
            packed = self.pending.wait()
        if packed.shape[0] == 1:
            return packed[0, ..., :-1].to(self.dtype)
        out, _ = merge(packed[..., :-1].unbind(0), packed[..., -1].transpose(1, 2).unbind(0))
        return out.to(self.dtype)


def attend_shards(q: Tensor, segments: list[Segment], *, scale: float, group: Group, backend: str = "auto") -> Merging:
    """Start the attention of rows that every rank holds over keys and values that are spread over the ranks.

    Serves the query's rows in prefill and every new token in decode.

    Args:
        q: (rows, heads, head_dim), the prompt's last rows, the same on every rank.
        segments: this rank's shard, which may be empty; causal where its last keys are those of the rows themselves.
        scale: factor on q.k.
        group: the ranks that hold the shards.
        backend: attention back-end.
    """
    with part("attention"):
        out, lse = attention(q, segments, scale, backend)
    return merge_over_ranks(out, lse, group, q.dtype)


def merge_over_ranks(out: Tensor, lse: Tensor, group: Group, dtype: torch.dtype) -> Merging:
    """Start to merge partial results over the ranks: out (rows, heads, head_dim), lse (heads, rows) fp32."""
    # One small fp32 message a rank and layer: the partial output with its log-sum-exp beside it.
    packed = torch.cat([out.float(), lse.T.unsqueeze(-1)], -1)
    return Merging(group.all_gather(packed), dtype)
