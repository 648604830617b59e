"""Bytes that ranks send each other in a prefill: the method's own, halos of sliding windows, the query's results."""

from __future__ import annotations

from .halo import sent_rows
from .network import Hosts, Sent
from .plan import Plan
from .shape import ModelShape


def sent(plan: Plan, rank: int, model: ModelShape, element_bytes: int, ranks_per_host: int | None = None) -> Sent:
    """Bytes a rank sends over all layers of a prefill; ``ranks_per_host``: None where all ranks share one host."""
    hosts = Hosts(plan.ranks, ranks_per_host)
    # Partial outputs and lse of the query's rows, in fp32, in every round.
    query = hosts.gather(plan.query * model.heads * (model.head_dim + 1) * 4) * (plan.rounds * model.layers)
    sliding = model.sliding(plan.total)
    full_layers = model.layers - sum(sliding.values())
    document = plan.method.sent(plan, rank, model, element_bytes, hosts) * full_layers
    for window, layers in sliding.items():
        rows = [count * model.pair_width * element_bytes for count in sent_rows(plan, window)[rank]]
        document += hosts.scatter(rank, rows) * layers
    return document + query
