"""What a plan costs: FLOPs, bytes sent, memory, and seconds where the hardware's ceilings are known.

Pure Python, like the plan. Conventions: a multiply-add is 2 FLOPs; attention counts only pairs that are not masked.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from .halo import sent_rows
from .memory import activations
from .plan import METHODS, Anchor, Kind, Plan, kv_heads_of


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that costs depend on.

    Attributes:
        layers, heads, kv_heads, head_dim, hidden, intermediate, vocabulary: as in its configuration.
        layer_parameters: weights that each row of a pass multiplies with, over all layers: those of the linear maps,
            and of as many experts as a token is sent to.
        parameters: all weights, embeddings included.
        windows: how far back each layer with a sliding window sees, own token included; the other layers see all.
        cache_width: numbers that a token's keys and values take in one layer's cache; 0: 2 * kv_heads * head_dim.
        expert_row: numbers that experts hold for one token, who all work at once; 0 without experts.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    layer_parameters: int
    parameters: int
    windows: tuple[int, ...] = ()
    cache_width: int = 0
    expert_row: int = 0

    @property
    def pair_width(self) -> int:
        """Numbers of one token's keys and values in one layer, as attention reads them and ranks send them."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def cache_row(self) -> int:
        """Numbers that one token's keys and values take in the cache, over all layers."""
        return self.layers * (self.cache_width or self.pair_width)

    def shared(self, size: int) -> ModelShape:
        """One process's share where ``size`` of them share the weights: of heads, MLPs, experts and the cache."""
        return replace(
            self,
            heads=self.heads // size,
            kv_heads=self.kv_heads // size,
            intermediate=self.intermediate // size,
            layer_parameters=self.layer_parameters // size,
            parameters=self.parameters // size,
            expert_row=self.expert_row // size,
        )

    def sliding(self, total: int) -> dict[int, int]:
        """The windows that hide something of so many tokens, and how many layers have each."""
        return Counter(window for window in self.windows if window < total)


@dataclass(frozen=True)
class Ceilings:
    """Rates that the hardware reaches: FLOP/s in linear maps and attention, bytes/s between devices and in memory."""

    linear: float
    attention: float
    link: float
    memory: float = math.inf

    @property
    def arithmetic(self) -> Ceilings:
        """The same, were bytes for nothing: what FLOPs alone take is the floor."""
        return Ceilings(self.linear, self.attention, math.inf)


# Measured with bf16 and random data: large matrix products, causal attention of 32K rows through cuDNN, a 256 MB
# all-gather between two devices over NVLink, a large copy (bytes read and written).
KNOWN_CEILINGS = {"NVIDIA H200": Ceilings(linear=769e12, attention=617e12, link=226e9, memory=4.2e12)}


@dataclass(frozen=True)
class RankCost:
    """What one rank does in prefill. ``moved_bytes``: read and written between linear maps and attention."""

    linear_flops: int
    attention_flops: int
    scoring_flops: int
    sent_bytes: int
    moved_bytes: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All memory at the widest moment."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return self.linear_flops + self.attention_flops + self.scoring_flops

    def seconds(self, ceilings: Ceilings) -> float:
        """Time at the ceilings, with nothing overlapped."""
        return (
            self.linear_flops / ceilings.linear
            + (self.attention_flops + self.scoring_flops) / ceilings.attention
            + (self.sent_bytes / ceilings.link if self.sent_bytes else 0.0)
            + self.moved_bytes / ceilings.memory
        )


@dataclass(frozen=True)
class Cost:
    """What a plan costs: every rank's part."""

    ranks: tuple[RankCost, ...]

    @property
    def flops(self) -> int:
        """Over all ranks."""
        return sum(rank.flops for rank in self.ranks)

    def seconds(self, ceilings: Ceilings) -> float:
        """The slowest rank's time."""
        return max(rank.seconds(ceilings) for rank in self.ranks)

    def to_dict(self, ceilings: Ceilings | None = None) -> dict[str, Any]:
        """Totals, the largest rank's bytes, and the ranks one by one."""
        return {
            "flops": self.flops,
            "linear_flops": sum(rank.linear_flops for rank in self.ranks),
            "attention_flops": sum(rank.attention_flops + rank.scoring_flops for rank in self.ranks),
            "sent_bytes_per_rank": max(rank.sent_bytes for rank in self.ranks),
            "cache_bytes_per_rank": max(rank.cache_bytes for rank in self.ranks),
            "peak_bytes_per_rank": max(rank.peak_bytes for rank in self.ranks),
            "seconds": None if ceilings is None else self.seconds(ceilings),
            "per_rank": [asdict(rank) | {"flops": rank.flops, "peak_bytes": rank.peak_bytes} for rank in self.ranks],
        }


def predict(plan: Plan, model: ModelShape, element_bytes: int = 2, compressor: str = "query") -> Cost:
    """The cost of a plan's prefill, with activations and cache in ``element_bytes`` a number."""
    return Cost(tuple(_rank(plan, rank, model, element_bytes, compressor) for rank in range(plan.ranks)))


def _rank(plan: Plan, rank: int, model: ModelShape, element_bytes: int, compressor: str) -> RankCost:
    contexts = plan.contexts()
    gathered = _gathered_rows(plan)
    rows = pairs = scored = kept = widest = 0
    for round in range(plan.rounds):
        widest = max(widest, activations(plan, rank, round, model, gathered[round]))
        for span in plan.spans(rank, round):
            length = len(span)
            rows += length
            if span.kind is Kind.ANCHOR:
                pairs += (span.stop * (span.stop + 1) - span.start * (span.start + 1)) // 2
            elif span.kind is Kind.BLOCK:
                kept += length
                pairs += _block_pairs(plan, length, contexts[span.block])
                scored += length if plan.passed(span.block) else 0
        pairs += plan.query * kept  # the query goes along in every round
        if rank == plan.tail_rank:
            pairs += plan.query * (plan.query + 1) // 2
    kept += plan.query if rank == plan.tail_rank else 0
    sliding = model.sliding(plan.total)
    exact_layers = sum(sliding.values())
    all_pairs = (model.layers - exact_layers) * pairs
    all_pairs += sum(layers * _window_pairs(plan, rank, window) for window, layers in sliding.items())
    if plan.rounds > 1:  # what later rounds see of earlier ones, of every layer
        widest += contexts[-1] * model.cache_row
    return RankCost(
        linear_flops=2 * rows * model.layer_parameters + 2 * plan.rounds * model.hidden * model.vocabulary,
        attention_flops=4 * model.heads * model.head_dim * all_pairs,
        scoring_flops=_scoring_flops(plan, model, compressor) * (model.layers - exact_layers) * scored,
        sent_bytes=_sent(plan, rank, model, element_bytes),
        moved_bytes=rows * model.layers * _moved(model) * element_bytes,
        weight_bytes=model.parameters * element_bytes,
        cache_bytes=kept * model.cache_row * element_bytes,
        activation_bytes=widest * element_bytes,
    )


def _moved(model: ModelShape) -> int:
    """Numbers that a row of a layer costs in memory traffic beside linear maps and attention, fused as far as it goes.

    Two norms and two residual additions, a pass over q and k for RoPE, gate and up to their product, a copy of the
    MLP's chunks, keys and values into the cache.
    """
    rotated = 2 * (model.heads + model.kv_heads) * model.head_dim
    return 12 * model.hidden + rotated + 3 * model.intermediate + 2 * model.pair_width


def _block_pairs(plan: Plan, length: int, context: int) -> int:
    """Query-key pairs of a block's rows, of so many tokens and so many keys before them."""
    if METHODS[plan.strategy].sparse:
        seen = min(plan.vertical_size + plan.slash_size, length)
        return seen * (seen + 1) // 2 + (length - seen) * seen
    return length * (length + 1) // 2 + length * context


def _window_pairs(plan: Plan, rank: int, window: int) -> int:
    """Query-key pairs of a rank on a layer with a sliding window, in any strategy."""

    def reach(stop: int) -> int:
        """Pairs of the rows at positions [0, stop), which see no further back than the window."""
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
            pairs += sum(max(min(row + 1, held.stop) - max(row + 1 - window, held.start), 0) for held in shard)
    return pairs


def _gathered_rows(plan: Plan) -> list[int]:
    """Pairs per KV head that a rank gives to a layer's collective, by round: the widest rank's, others are padded."""
    if plan.blocks == 1 or METHODS[plan.strategy].anchor is not Anchor.WITH_QUERY:
        return [0] * plan.rounds
    widths = [[0] * plan.ranks for _ in range(plan.rounds)]
    for rank in range(plan.ranks):
        start, stop = plan.anchor_share(rank)
        widths[0][rank] += stop - start
        for block in plan.owned(rank):
            widths[block.round][rank] += plan.passed(block.index)
    return [max(width) for width in widths]


def _sent(plan: Plan, rank: int, model: ModelShape, element_bytes: int) -> int:
    """Bytes a rank sends over all layers of a prefill."""
    others = plan.ranks - 1
    # Partial outputs and lse of the query's rows, in fp32, in every round.
    query = plan.rounds * plan.query * model.heads * (model.head_dim + 1) * model.layers * 4
    rows = [sum(map(len, plan.owned(each))) for each in range(plan.ranks)]
    sliding = model.sliding(plan.total)
    layers = model.layers - sum(sliding.values())
    halos = sum(count * sent_rows(plan, window)[rank] for window, count in sliding.items()) * model.pair_width
    if plan.strategy == "ring":
        document = others * max(rows) * model.pair_width
    elif plan.strategy == "ulysses":
        # q, k and v of this rank's rows go to the ranks that have the heads, and the outputs of theirs go back.
        share, group = max(model.heads // plan.ranks, 1), model.heads // model.kv_heads
        sent = 0
        for other in range(plan.ranks):
            if other != rank:
                kv_heads = len(kv_heads_of(other * share, share, group))
                sent += rows[rank] * (share + 2 * kv_heads) + rows[other] * share
        document = sent * model.head_dim
    else:
        document = others * sum(_gathered_rows(plan)) * model.pair_width
    return (layers * document + halos) * element_bytes + others * query


def _scoring_flops(plan: Plan, model: ModelShape, compressor: str) -> int:
    """FLOPs of a layer to score one token."""
    if compressor in ("query", "query-edge"):
        return 2 * plan.query * model.heads * model.head_dim
    if compressor == "retaining":
        features = (model.heads + 2 * model.kv_heads) * model.head_dim
        return 2 * 1024 * (features + model.kv_heads)
    return 0
