"""Bytes that ranks send each other in a prefill: the method's own, halos of windows, states, the query's results."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from .halo import sent_rows
from .network import Hosts, Sent
from .plan import Plan
from .runs import GPU_COMPOSED, anchor_runs, composed, document_runs
from .shape import ModelShape


def sent(
    plan: Plan,
    rank: int,
    model: ModelShape,
    element_bytes: int,
    ranks_per_host: int | None = None,
    most_composed: int = GPU_COMPOSED,
) -> Sent:
    """Bytes a rank sends over all layers of a prefill.

    Args:
        ranks_per_host: None where all ranks share one host.
        most_composed: see :func:`apb.planning.runs.composed`.
    """
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
    return document + query * plan.rounds + _states(plan, rank, model, element_bytes, hosts, most_composed)


def _states(plan: Plan, rank: int, model: ModelShape, element_bytes: int, hosts: Hosts, most_composed: int) -> Sent:
    """States of recurrent layers, to the rank with the next rows, and from that with the last ones to all.

    Where runs are composed, what they do to states instead, and the last rows of each, from every rank to all.
    """
    if model.recurrent is None or plan.ranks == 1:
        return Sent()
    size = model.recurrent.state_bytes(element_bytes)
    effects = model.recurrent.effect * 4
    lookback = model.recurrent.layers * model.recurrent.lookback * model.hidden * element_bytes
    counts, gathered = [0] * plan.ranks, Sent()
    for round in range(plan.rounds):
        document = document_runs(plan, round)
        sequences = anchor_runs(plan, round)
        if effects and composed(plan, round, most_composed):
            most = max(Counter(run.rank for run in document).values())
            gathered += hosts.gather(most * effects) + hosts.gather(most * lookback)
        else:
            sequences.append(document)
        for runs in sequences:
            for run, following in pairwise(runs):
                counts[following.rank] += run.rank == rank
        if document[-1].rank == rank:
            counts = [count + 1 for count in counts]
    return hosts.scatter(rank, [count * size for count in counts]) + gathered
