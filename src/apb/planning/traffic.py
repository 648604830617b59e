"""Bytes that ranks send each other in a prefill: the method's own, halos of windows, states, the query's results."""

from __future__ import annotations

from itertools import pairwise

from .halo import sent_rows
from .network import Hosts, Sent
from .plan import Plan
from .runs import anchor_runs, document_runs
from .shape import ModelShape


def sent(plan: Plan, rank: int, model: ModelShape, element_bytes: int, ranks_per_host: int | None = None) -> Sent:
    """Bytes a rank sends over all layers of a prefill; ``ranks_per_host``: None where all ranks share one host."""
    hosts = Hosts(plan.ranks, ranks_per_host)
    # Partial outputs and lse of the query's rows, in fp32, in every round.
    sliding = model.sliding(plan.total)
    near_layers = len(model.windows)
    full_layers = model.attention_layers - sum(sliding.values())
    query = hosts.gather(plan.query * model.heads * (model.head_dim + 1) * 4) * (model.attention_layers - near_layers)
    query += hosts.gather(plan.query * model.heads * (model.near_head_dim + 1) * 4) * near_layers
    document = plan.method.sent(plan, rank, model, element_bytes, hosts) * full_layers
    for window, layers in sliding.items():
        rows = [count * model.near_pair_width * element_bytes for count in sent_rows(plan, window, model.chunked)[rank]]
        document += hosts.scatter(rank, rows) * layers
    return document + query * plan.rounds + _states(plan, rank, model, element_bytes, hosts)


def _states(plan: Plan, rank: int, model: ModelShape, element_bytes: int, hosts: Hosts) -> Sent:
    """States of recurrent layers, to the rank with the next rows, and from that with the last ones to all."""
    if model.recurrent is None or plan.ranks == 1:
        return Sent()
    size = model.recurrent.state_bytes(element_bytes)
    counts = [0] * plan.ranks
    for round in range(plan.rounds):
        document = document_runs(plan, round)
        for runs in (*anchor_runs(plan, round), document):
            for run, following in pairwise(runs):
                counts[following.rank] += run.rank == rank
        if document[-1].rank == rank:
            counts = [count + 1 for count in counts]
    return hosts.scatter(rank, [count * size for count in counts])
