"""Bytes that ranks send each other in a prefill, and which of them leave a host: pure Python, like the plan.

Inside a host devices reach each other over one kind of link, between hosts over another, where every device has a
network adapter of its own. Three patterns occur, and each crosses hosts in its own way:

- all-gather (apb's anchor and passed pairs, the query's partial results): NCCL runs it as rings. A host has as many as
  it has devices, each leaving through another one's adapter, so that an adapter carries that share of what a device
  sends in all.
- shift (ring attention): a rank sends to the next one. Of each host one rank has its neighbour on another, and all
  that it sends leaves through its adapter; in every step the others wait for it.
- all-to-all (ulysses, halos of sliding windows): what is meant for ranks on other hosts leaves, through the sender's
  adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .halo import sent_rows
from .methods import kv_heads_of
from .plan import Plan
from .shape import ModelShape


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends, and those of them that leave its host through its adapter."""

    total: int = 0
    leaving: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.total + other.total, self.leaving + other.leaving)

    def __mul__(self, times: int) -> Sent:
        return Sent(self.total * times, self.leaving * times)


@dataclass(frozen=True)
class Hosts:
    """Consecutive ranks share a host, ``size`` of them or all; the last host may have fewer."""

    ranks: int
    size: int | None = None

    def apart(self, rank: int, other: int) -> bool:
        """Whether two ranks are on different hosts."""
        return self.size is not None and rank // self.size != other // self.size

    def gather(self, bytes_each: int) -> Sent:
        """What a rank sends in an all-gather to which every rank gives so many bytes."""
        total = (self.ranks - 1) * bytes_each
        if self.size is None or self.ranks <= self.size:
            return Sent(total)
        return Sent(total, -(-total // (self.ranks % self.size or self.size)))  # as many rings as the smallest host has

    def scatter(self, rank: int, bytes_to: list[int]) -> Sent:
        """What a rank sends in an all-to-all with so many bytes for every rank."""
        others = [other for other in range(self.ranks) if other != rank]
        leaving = sum(bytes_to[other] for other in others if self.apart(rank, other))
        return Sent(sum(bytes_to[other] for other in others), leaving)


def sent(plan: Plan, rank: int, model: ModelShape, element_bytes: int, ranks_per_host: int | None = None) -> Sent:
    """What a rank sends over all layers of a prefill; ``ranks_per_host``: None where all are on one."""
    hosts = Hosts(plan.ranks, ranks_per_host)
    # Partial outputs and lse of the query's rows, in fp32, in every round.
    query = hosts.gather(plan.query * model.heads * (model.head_dim + 1) * 4) * (plan.rounds * model.layers)
    sliding = model.sliding(plan.total)
    document = _document(plan, rank, model, element_bytes, hosts) * (model.layers - sum(sliding.values()))
    for window, layers in sliding.items():
        rows = [count * model.pair_width * element_bytes for count in sent_rows(plan, window)[rank]]
        document += hosts.scatter(rank, rows) * layers
    return document + query


def _document(plan: Plan, rank: int, model: ModelShape, element_bytes: int, hosts: Hosts) -> Sent:
    """What a rank sends in one layer for the document's rows."""
    rows = _rows(plan)
    if plan.strategy == "ring":
        total = (plan.ranks - 1) * max(rows) * model.pair_width * element_bytes
        return Sent(total, total if hosts.apart(rank, (rank + 1) % plan.ranks) else 0)
    if plan.method.scatters_heads:
        # q, k and v of this rank's rows go to the ranks that have the heads, and the outputs of theirs go back.
        share, group = max(model.heads // plan.ranks, 1), model.heads // model.kv_heads
        kv_heads = [len(kv_heads_of(other * share, share, group)) for other in range(plan.ranks)]
        numbers = [
            rows[rank] * (share + 2 * kept) + other_rows * share
            for other_rows, kept in zip(rows, kv_heads, strict=True)
        ]
        return hosts.scatter(rank, [count * model.head_dim * element_bytes for count in numbers])
    return hosts.gather(sum(gathered_rows(plan)) * model.pair_width * element_bytes)


@lru_cache(maxsize=8)  # asked for by every rank of a plan
def _rows(plan: Plan) -> tuple[int, ...]:
    """The document's rows of every rank."""
    return tuple(sum(map(len, plan.owned(rank))) for rank in range(plan.ranks))


@lru_cache(maxsize=8)
def gathered_rows(plan: Plan) -> tuple[int, ...]:
    """Pairs per KV head that a rank gives to a layer's collective, by round: the widest rank's, others are padded."""
    if plan.blocks == 1 or not plan.method.passes:
        return (0,) * plan.rounds
    widths = [[0] * plan.ranks for _ in range(plan.rounds)]
    for rank in range(plan.ranks):
        start, stop = plan.anchor_share(rank)
        widths[0][rank] += stop - start
        for block in plan.owned(rank):
            widths[block.round][rank] += plan.passed(block.index)
    return tuple(max(width) for width in widths)
