"""The cost of a plan: FLOPs, bytes sent, memory, and seconds if the hardware's ceilings are known.

Pure Python, like the plan. Conventions: a multiply-add is 2 FLOPs; attention counts only pairs that are not masked.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .halo import first_seen
from .itinerary import Kind
from .memory import activations
from .network import Hosts, Sent
from .plan import Plan
from .runs import GPU_COMPOSED, rows_composed, rows_of_others
from .shape import ModelShape
from .traffic import sent


@dataclass(frozen=True)
class Ceilings:
    """Rates that the hardware reaches.

    Attributes:
        linear, attention: FLOP/s in linear maps and in attention.
        link: bytes/s that a device sends to others of its host; 0 if there are none.
        memory: bytes/s read and written on a device.
        network: bytes/s that a device sends to other hosts, through an adapter of its own; 0 if there are none.
    """

    linear: float
    attention: float
    link: float
    memory: float = math.inf
    network: float = 0.0

    @property
    def arithmetic(self) -> Ceilings:
        """The same with free memory traffic and communication: the time of FLOPs alone is the floor."""
        return Ceilings(self.linear, self.attention, math.inf, network=math.inf)


# Medians of what runs of `apb bench prefill` measured on 16 days or machines, in bf16 with random data, sustained: a
# large matrix product, causal attention of 32K rows, an all-gather between two devices over NVLink, a large copy (bytes
# read and written).
KNOWN_CEILINGS = {"NVIDIA H200": Ceilings(linear=665e12, attention=631e12, link=228e9, memory=4.2e12)}
# What recurrent layers take beside their linear maps, as numbers read and written for a row, over those that the maps
# write: measured in transformers' gated delta nets (Qwen3.5's shape) on an H200, with the kernels of
# flash-linear-attention, which take a quarter of it; most are the convolution and copies, transformers' own.
MOVED_IN_RECURRENCE = 43
# What composing their runs adds to that, an estimate: three quarters of what those kernels take, whose values, outputs
# and states are twice as wide then, while queries and keys are as they were.
MOVED_IN_COMPOSITION = 8
# Seconds that a GPU waits for the host, which learns the rows that go on, deals them and prepares their attention: the
# median of what eleven prefills with propagation on one and two H200s took beyond the rest, of 32K tokens as of 512K.
DEALING_SECONDS = 0.05


@dataclass(frozen=True)
class RankCost:
    """The cost of one rank's prefill.

    Of ``sent_bytes``, ``network_bytes`` leave the rank's host (see network.py). ``moved_bytes`` are read and written
    between linear maps and attention. ``waiting_flops`` and ``waiting_bytes`` are those of other ranks in recurrent
    layers, which this rank waits for where a state runs through the ranks' rows one after the other. The FLOPs of such
    layers beside linear maps, about a hundredth of those, are not counted. ``state_bytes`` are two states of them,
    before and after the query. If the layers of a rank are on several GPUs, bytes of weights, cache and activations are
    those of the GPU that holds most.
    """

    linear_flops: int
    attention_flops: int
    scoring_flops: int
    sent_bytes: int
    network_bytes: int
    moved_bytes: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    waiting_flops: int = 0
    waiting_bytes: int = 0
    state_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Memory at its peak."""
        return self.weight_bytes + self.cache_bytes + self.state_bytes + self.activation_bytes

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return self.linear_flops + self.attention_flops + self.scoring_flops

    def seconds(self, ceilings: Ceilings, hidden: bool = False) -> float:
        """Time at the ceilings; ``hidden``: communication overlaps with attention, else precedes it."""
        attention = (self.attention_flops + self.scoring_flops) / ceilings.attention
        sending = self.sending_seconds(ceilings)
        others = (self.linear_flops + self.waiting_flops) / ceilings.linear
        others += (self.moved_bytes + self.waiting_bytes) / ceilings.memory
        return others + (max(attention, sending) if hidden else attention + sending)

    def sending_seconds(self, ceilings: Ceilings) -> float:
        """Time to send: traffic inside the host and out of it run in parallel, so the slower of the two counts."""
        inside = self.sent_bytes - self.network_bytes
        return max(
            inside / ceilings.link if inside else 0.0,
            self.network_bytes / ceilings.network if self.network_bytes else 0.0,
        )


@dataclass(frozen=True)
class Cost:
    """The cost of a plan, rank by rank.

    ``overlaps``: True if its strategy computes while it sends. ``gpus``: GPUs that hold the layers of a rank.
    ``host_seconds``: in which all devices wait for their hosts, whatever their ceilings.
    """

    ranks: tuple[RankCost, ...]
    overlaps: bool
    gpus: int = 1
    host_seconds: float = 0.0

    @property
    def flops(self) -> int:
        """Floating-point operations of all ranks."""
        return sum(rank.flops for rank in self.ranks)

    def seconds(self, ceilings: Ceilings, hidden: bool = False) -> float:
        """The slowest rank's time; ``hidden``: communication overlaps if the strategy can, else nothing does."""
        return self.host_seconds + max(rank.seconds(ceilings, hidden and self.overlaps) for rank in self.ranks)

    def floor(self, ceilings: Ceilings) -> float:
        """The slowest rank's time for FLOPs alone."""
        return max(rank.seconds(ceilings.arithmetic) for rank in self.ranks)

    def to_dict(self, ceilings: Ceilings | None = None) -> dict[str, Any]:
        """Totals, the largest rank's bytes, and the ranks one by one.

        Cache and peak are called ``..._per_gpu`` where a rank has several: they are those of the fullest.
        """
        unit = "rank" if self.gpus == 1 else "gpu"
        return {
            "flops": self.flops,
            "linear_flops": sum(rank.linear_flops for rank in self.ranks),
            "attention_flops": sum(rank.attention_flops + rank.scoring_flops for rank in self.ranks),
            "sent_bytes_per_rank": max(rank.sent_bytes for rank in self.ranks),
            "network_bytes_per_rank": max(rank.network_bytes for rank in self.ranks),
            f"cache_bytes_per_{unit}": max(rank.cache_bytes for rank in self.ranks),
            f"peak_bytes_per_{unit}": max(rank.peak_bytes for rank in self.ranks),
            "seconds": None if ceilings is None else self.seconds(ceilings),
            "hidden_seconds": None if ceilings is None else self.seconds(ceilings, hidden=True),
            "per_rank": [asdict(rank) | {"flops": rank.flops, "peak_bytes": rank.peak_bytes} for rank in self.ranks],
        }


class Scoring(Protocol):
    """The part of a compressor that a plan's cost depends on."""

    def flops(self, model: ModelShape, query: int) -> int:
        """FLOPs to score one token in one layer, for all KV heads, with ``query`` query rows."""

    def flops_to_compare(self, model: ModelShape, query: int) -> int:
        """FLOPs to score it once more, comparably with tokens of other blocks."""


def predict(
    plan: Plan,
    model: ModelShape,
    element_bytes: int = 2,
    compressor: Scoring | None = None,
    ranks_per_host: int | None = None,
    most_composed: int = GPU_COMPOSED,
) -> Cost:
    """The cost of a plan's prefill, with activations and cache in ``element_bytes`` a number.

    Args:
        compressor: scores the tokens that are passed; None leaves its FLOPs out.
        ranks_per_host: number of consecutive ranks that share a host; None: all of them.
        most_composed: rows of a rank that are composed in recurrent layers, see :func:`apb.planning.runs.composed`.
    """

    def cost(part: Plan, shape: ModelShape) -> list[RankCost]:
        ranks = range(plan.ranks)
        sending = [sent(part, rank, shape, element_bytes, ranks_per_host, most_composed) for rank in ranks]
        return [_rank(part, rank, shape, element_bytes, compressor, sending[rank], most_composed) for rank in ranks]

    ranks, dealing = cost(plan, model), 0.0
    if plan.propagation is not None and plan.propagation.layer is not None and plan.going_on < plan.document:
        first = plan.propagation.layer + 1
        below = cost(plan, model.part(range(first)))
        above = cost(plan.above, model.part(range(first, model.layers)))
        hosts, dealing = Hosts(plan.ranks, ranks_per_host), DEALING_SECONDS
        ranks = [
            _propagated(plan, rank, model, element_bytes, hosts, *parts)
            for rank, parts in enumerate(zip(ranks, below, above, strict=True))
        ]
    return Cost(tuple(ranks), plan.method.overlaps, len(model.split) or 1, dealing)


def _propagated(
    plan: Plan,
    rank: int,
    model: ModelShape,
    element_bytes: int,
    hosts: Hosts,
    without: RankCost,
    below: RankCost,
    above: RankCost,
) -> RankCost:
    """The cost of a rank whose layers are read in two parts; ``without``: if all rows went through all layers."""
    held = sum(len(block) for block in plan.owned(rank))
    # A row and what comes with it of its position; of the rows that go on, those that other ranks take.
    row = (model.hidden + 2 * model.head_dim) * element_bytes
    leaving = held * plan.going_on // plan.document // plan.ranks * row
    moved = hosts.scatter(rank, [leaving] * plan.ranks) + hosts.gather(-(-4 * plan.document // plan.ranks)) * 2
    waiting = sum(len(block) for block in plan.owned(rank) if block.round < plan.rounds - 1) * row
    memory = without if model.split else below  # split layers: at most what they take if all rows go through
    return RankCost(
        linear_flops=below.linear_flops + above.linear_flops,
        attention_flops=below.attention_flops + above.attention_flops,
        scoring_flops=below.scoring_flops + 2 * plan.query * model.heads * model.head_dim * held,
        sent_bytes=below.sent_bytes + above.sent_bytes + moved.total,
        network_bytes=below.network_bytes + above.network_bytes + moved.leaving,
        moved_bytes=below.moved_bytes + above.moved_bytes,
        weight_bytes=without.weight_bytes,
        cache_bytes=memory.cache_bytes + (0 if model.split else above.cache_bytes),
        activation_bytes=max(memory.activation_bytes, above.activation_bytes) + waiting,
    )


def _rank(
    plan: Plan,
    rank: int,
    model: ModelShape,
    element_bytes: int,
    compressor: Scoring | None,
    sending: Sent,
    most_composed: int,
) -> RankCost:
    gathered = plan.method.gathered(plan)
    rows = query_pairs = scored = kept = widest = 0
    for round in range(plan.rounds):
        widest = max(widest, activations(plan, rank, round, model, gathered[round], most_composed))
        for span in plan.spans(rank, round):
            rows += len(span)
            if span.kind is Kind.BLOCK:
                kept += len(span)
                scored += len(span) if plan.passed(span.block) else 0
        query_pairs += plan.query * kept  # the query's rows run in every round
        if rank == plan.tail_rank:
            query_pairs += plan.query * (plan.query + 1) // 2
    kept += plan.query if rank == plan.tail_rank else 0
    sliding = model.sliding(plan.total)
    full_layers = model.attention_layers - sum(sliding.values())
    attended = full_layers * (plan.method.attended(plan, rank, model.heads) + model.heads * query_pairs)
    near = model.heads * sum(
        count * _window_pairs(plan, rank, window, model.chunked) for window, count in sliding.items()
    )
    carried = plan.contexts()[-1] if plan.rounds > 1 else 0  # pairs of earlier rounds that later ones see, per layer
    layers, parameters = model.fullest(kept + carried)
    widest += carried * layers * model.layer_cache_row
    recurrent = model.recurrent
    most_composed = most_composed if recurrent is not None and recurrent.effect else 0
    waiting = 0 if recurrent is None else rows_of_others(plan, rank, most_composed)
    composing = sum(rows_composed(plan, rank, round, most_composed) for round in range(plan.rounds))
    composing *= 0 if recurrent is None else MOVED_IN_COMPOSITION * recurrent.written
    scoring = 0
    if compressor is not None:
        scoring = compressor.flops(model, plan.query)
        scoring += 0 if plan.competing is None else compressor.flops_to_compare(model, plan.query)
    return RankCost(
        linear_flops=2 * rows * model.layer_parameters + 2 * plan.rounds * model.hidden * model.vocabulary,
        attention_flops=4 * (model.head_dim * attended + model.near_head_dim * near),
        scoring_flops=scoring * full_layers * scored,
        sent_bytes=sending.total,
        network_bytes=sending.leaving,
        moved_bytes=(rows * (_moved(model) + _moved_in_recurrence(model)) + composing) * element_bytes,
        weight_bytes=parameters * element_bytes,
        cache_bytes=kept * layers * model.layer_cache_row * element_bytes,
        activation_bytes=widest * element_bytes,
        waiting_flops=0 if recurrent is None else 2 * recurrent.parameters * waiting,
        waiting_bytes=waiting * _moved_in_recurrence(model) * element_bytes,
        state_bytes=0 if recurrent is None else 2 * recurrent.state_bytes(element_bytes),
    )


def _moved(model: ModelShape) -> int:
    """Memory traffic of a row in all layers, in numbers, beside linear maps and attention, fused as far as possible.

    Two norms and two residual additions, a pass over q and k for RoPE, gate and up to their product, a copy of the
    MLP's chunks, keys and values into the cache.
    """
    rotated = 2 * (model.heads + model.kv_heads) * model.head_dim
    everywhere = 12 * model.hidden + 3 * model.intermediate
    return model.layers * everywhere + model.attention_layers * (rotated + 2 * model.pair_width)


def _moved_in_recurrence(model: ModelShape) -> int:
    """The same inside the recurrent layers, whose code is transformers' own: of it the gated norm alone is fused."""
    return 0 if model.recurrent is None else MOVED_IN_RECURRENCE * model.recurrent.written


def _window_pairs(plan: Plan, rank: int, window: int, chunked: bool = False) -> int:
    """Query-key pairs of a rank on a layer with a window, in any strategy."""

    def reach(stop: int) -> int:
        """Pairs of the rows at positions [0, stop), each limited to its window."""
        if chunked:
            whole, rest = divmod(stop, window)
            return whole * (window * (window + 1) // 2) + rest * (rest + 1) // 2
        grown = min(stop, window)
        return grown * (grown + 1) // 2 + (stop - grown) * window

    pairs = 0
    shard = [range(plan.query_start, plan.total)] if rank == plan.tail_rank else []
    for round in range(plan.rounds):
        for span in plan.spans(rank, round):
            if span.kind is not Kind.QUERY:
                pairs += reach(span.stop) - reach(span.start)
            if span.kind is Kind.BLOCK:
                shard.append(range(span.start, span.stop))
        for row in range(plan.query_start, plan.total):
            pairs += sum(
                max(min(row + 1, held.stop) - max(first_seen(row, window, chunked), held.start), 0) for held in shard
            )
    return pairs
