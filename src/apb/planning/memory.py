"""What a prefill holds at its widest moment, beside weights and cache: what is alive at once in a layer.

In numbers (elements of the model's dtype), for a rank's rows of one round. Two moments compete: attention, when q, k,
v, the residual stream and its normed copy are alive with what the strategy merges; and the MLP, which works on chunks
of rows, in its last chunk or when its chunks are put together. tests/distributed/test_several_ranks.py counts what is
alive.
"""

from __future__ import annotations

from .methods import kv_heads_of
from .plan import Kind, Plan
from .shape import ModelShape

# Rows that a dense MLP works on at a time: on the CPU its intermediate values stay in the cache, on a GPU a chunk still
# fills the device.
CPU_ROWS = 2048
GPU_ROWS = 16384
# fp32 partial results counted in numbers of two bytes, as merging holds them: the sum, one that is added, and that one
# before it was weighted.
_MERGING = 6


def activations(plan: Plan, rank: int, round: int, model: ModelShape, gathered: int) -> int:
    """Numbers alive at the widest moment of a rank's layer; ``gathered``: pairs a rank gives to the collective."""
    spans = plan.spans(rank, round)
    rows = sum(map(len, spans))
    blocks = [len(span) for span in spans if span.kind is Kind.BLOCK]
    head = model.heads * model.head_dim
    q_k_v = rows * (head + model.pair_width)
    # Through all layers: the rows as they were embedded, sines and cosines of their positions.
    always = rows * (model.hidden + 2 * model.head_dim)
    stream = rows * model.hidden
    attention = 2 * stream + q_k_v + rows * head + _strategy(plan, rank, rows, blocks, model, gathered)
    # What came into the layer lives on beside the sum that came out of attention and its normed copy.
    chunk = min(rows, GPU_ROWS)
    widest_chunk = (rows - chunk) * model.hidden + chunk * 3 * model.intermediate
    mlp = 3 * stream + max(2 * stream, widest_chunk) + rows * model.expert_row
    return always + max(attention, mlp)


def _strategy(plan: Plan, rank: int, rows: int, blocks: list[int], model: ModelShape, gathered: int) -> int:
    """What a strategy holds beside q, k, v and the output of all rows."""
    head, pair = model.heads * model.head_dim, model.pair_width
    longest = max(blocks, default=0)
    if plan.strategy == "ring":
        # Keys and values on their way, at hand and arriving; the whole output in fp32, and what a step adds to it.
        return 2 * rows * pair + rows * head * (2 + 1 + _MERGING)
    if plan.method.scatters_heads:
        share, group = max(model.heads // plan.ranks, 1), model.heads // model.kv_heads
        kv_heads = [len(kv_heads_of(other * share, share, group)) for other in range(plan.ranks)]
        packed = rows * (head + 2 * sum(kv_heads) * model.head_dim)
        received = rows * plan.ranks * (share + 2 * kv_heads[rank]) * model.head_dim
        # Put together while both are alive; then beside the outputs, packed again and received.
        return max(packed + 2 * received, received + 3 * rows * head)
    merging = longest * head * (2 + _MERGING)
    if plan.method.passes and plan.blocks > 1:
        # With others to wait for, what blocks see of them comes apart from what they see of themselves.
        if plan.ranks > 1:
            merging = rows * head + longest * head * _MERGING
        return (1 + 2 * plan.ranks) * gathered * pair + merging
    return merging if plan.blocks > 1 else longest * head
