"""What a strategy is: the attention of one layer over one rank's rows, in prefill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compressors import Compressor
from ..distributed.collectives import Group, Pending
from ..kernels.attention import Segment, attention
from ..kernels.merge import merge
from ..kernels.window import Run, window_attention
from ..parts import part
from ..planning.plan import Kind, Plan, Span
from .halos import Halos

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
        window: how many keys a row sees at most, its own included; None where nothing is out of its reach.
        softcap: as in :func:`apb.attention`.
        sinks: (heads,), logits that take part in every row's softmax and bring no value; None without.
        earlier: keys and values (tokens, kv_heads, head_dim) that this rank's cache holds of earlier rounds; None in
            the first.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    before_rope: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    earlier: tuple[Tensor, Tensor] | None = None

    @property
    def plain(self) -> bool:
        """Whether attention is a softmax of q.k over all keys, and nothing else."""
        return self.window is None and self.softcap is None and self.sinks is None

    def settle(self, out: Tensor, lse: Tensor, heads: slice = slice(None)) -> Tensor:
        """Rows over all keys they see, (rows, heads, head_dim) with lse (heads, rows), as the model takes them.

        The sinks join the softmax here, once, when all partial results are merged. ``heads`` says which the rows have.
        """
        if self.sinks is not None:
            out = out * torch.sigmoid(lse - self.sinks[heads].float()[:, None]).T.unsqueeze(-1)
        return out.to(self.q.dtype)


class Strategy(ABC):
    """One method of prefill on one rank. Subclasses attend the document's rows; the query's rows are alike for all."""

    def __init__(self, plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> None:
        self.plan = plan
        self.method = plan.method
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
        before = (block for block in self.plan.owned(self.group.rank) if block.round < round)
        self._earlier = [range(block.start, block.stop) for block in before]
        self._halos: dict[int, Halos] = {}

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
        out = layer.q.new_empty(layer.q.shape)  # contiguous, as the output projection wants it
        query = self._start_query(layer)
        if layer.window is None:
            self.attend_document(layer, out)
        else:
            self._attend_window(layer, layer.window, out)
        out[self.query.rows] = query.wait()
        return out

    @abstractmethod
    def attend_document(self, layer: Layer, out: Tensor) -> None:
        """Write the attention of the anchor's and the blocks' rows into ``out`` (rows, heads, head_dim)."""

    def _start_query(self, layer: Layer) -> Merging:
        rows = self._shard_rows(self._owns_tail)
        return attend_shards(
            replace(layer, q=layer.q[self.query.rows], k=layer.k[rows], v=layer.v[rows]),
            self.query.start,
            [range(span.start, span.stop) for span in (*self.blocks, *([self.query] if self._owns_tail else []))],
            earlier=self._earlier,
            group=self.group,
            backend=self.backend,
        )

    def _attend_window(self, layer: Layer, window: int, out: Tensor) -> None:
        """A layer with a sliding window is exact in every strategy: rows see what the window holds, fetched if need be.

        The anchor's rows see the anchor alone.
        """
        if window not in self._halos:
            self._halos[window] = Halos(self.plan, self.group, window, self.round)
        with part("communication"):
            runs = self._halos[window].fetch(layer.k, layer.v, layer.earlier)
        for span in (self.anchor, *self.blocks):
            if span:
                attended = window_attention(
                    lambda q, segments: self.attention(layer, q, segments),
                    layer.q[span.rows],
                    span.start,
                    [runs[span]],
                    window,
                )
                out[span.rows] = layer.settle(*attended)

    def attention(self, layer: Layer, q: Tensor, segments: list[Segment]) -> tuple[Tensor, Tensor]:
        """:func:`apb.attention` with this strategy's back-end and the layer's scale and cap."""
        with part("attention"):
            return attention(q, segments, layer.scale, self.backend, layer.softcap)

    def own(self, layer: Layer, span: Span) -> Segment:
        """A block's keys and values as its own rows see them."""
        return Segment(layer.k[span.rows], layer.v[span.rows], causal=True)


@dataclass
class Merging:
    """Rows whose partial results are on their way from all ranks; ``wait`` merges them."""

    pending: Pending
    layer: Layer

    def wait(self) -> Tensor:
        """The merged output (rows, heads, head_dim), the same on every rank."""
        with part("communication"):
            packed = self.pending.wait()
        outs, lses = packed[..., :-1].unbind(0), packed[..., -1].transpose(1, 2).unbind(0)
        return self.layer.settle(*(merge(outs, lses) if len(outs) > 1 else (outs[0], lses[0])))


def attend_shards(
    layer: Layer,
    first: int,
    shard: Sequence[range],
    *,
    earlier: Sequence[range] = (),
    group: Group,
    backend: str = "auto",
) -> Merging:
    """Start the attention of rows that every rank holds over keys and values that are spread over the ranks.

    Serves the query's rows in prefill and every new token in decode.

    Args:
        layer: q of the last rows there are, the same on every rank; k and v of this rank's shard, which may be empty.
        first: true position of the first of these rows.
        shard: true positions of the shard's keys, one range after the other; the rank whose last range ends where the
            rows do holds the rows' own keys, which they see causally.
        earlier: the same of ``layer.earlier``.
        group: the ranks that hold the shards.
        backend: attention back-end.
    """

    def attend(q: Tensor, segments: list[Segment]) -> tuple[Tensor, Tensor]:
        return attention(q, segments, layer.scale, backend, layer.softcap)

    with part("attention"):
        if layer.window is None:
            ends_here = bool(shard) and shard[-1].stop == first + layer.q.shape[0]
            segments = [] if layer.earlier is None else [Segment(*layer.earlier)]
            out, lse = attend(layer.q, [*segments, Segment(layer.k, layer.v, causal=ends_here)])
        else:
            runs = [] if layer.earlier is None else _runs(*layer.earlier, earlier)
            runs += _runs(layer.k, layer.v, shard)
            out, lse = window_attention(attend, layer.q, first, runs, layer.window)
    return merge_over_ranks(layer, out, lse, group)


def merge_over_ranks(layer: Layer, out: Tensor, lse: Tensor, group: Group) -> Merging:
    """Start to merge partial results over the ranks: out (rows, heads, head_dim), lse (heads, rows) fp32."""
    # One small fp32 message a rank and layer: the partial output with its log-sum-exp beside it.
    packed = torch.cat([out.float(), lse.T.unsqueeze(-1)], -1)
    return Merging(group.all_gather(packed), layer)


def _runs(k: Tensor, v: Tensor, held: Sequence[range]) -> list[Run]:
    """Keys at these positions by runs: ranges that follow each other are one."""
    runs: list[Run] = []
    row = 0
    for positions in held:
        stop = row + len(positions)
        if runs and runs[-1].stop == positions.start:
            start, first = row - runs[-1].k.shape[0], runs[-1].first
            runs[-1] = Run(k[start:stop], v[start:stop], first)
        elif positions:
            runs.append(Run(k[row:stop], v[row:stop], positions.start))
        row = stop
    return runs
