"""Activations of a prefill at their widest moment, beside weights and cache, for a rank's rows of one round.

In numbers (elements of the model's dtype). Two moments compete: attention, when q, k, v, the residual stream and its
normed copy are alive with what the strategy merges; and the MLP, which works on chunks of rows, in its last chunk or
when its chunks are put together. tests/distributed/test_several_ranks.py counts what is alive.
"""

from __future__ import annotations

from .plan import Kind, Plan
from .shape import ModelShape

# Rows that a dense MLP works on at a time: on the CPU its intermediate values stay in the cache, on a GPU a chunk still
# fills the device.
CPU_ROWS = 2048
GPU_ROWS = 16384


def activations(plan: Plan, rank: int, round: int, model: ModelShape, gathered: int) -> int:
    """Numbers alive at the widest moment of a rank's layer; ``gathered``: pairs a rank gives to the collective."""
    spans = plan.spans(rank, round)
    rows = sum(map(len, spans))
    blocks = [len(span) for span in spans if span.kind is Kind.BLOCK]
    width = model.heads * model.head_dim
    q_k_v = rows * (width + model.pair_width)
    # Through all layers: the rows as they were embedded, sines and cosines of their positions.
    always = rows * (model.hidden + 2 * model.head_dim)
    stream = rows * model.hidden
    attention = 2 * stream + q_k_v + rows * width + plan.method.held(plan, rank, rows, blocks, model, gathered)
    # The layer's input lives on beside the sum that came out of attention and its normed copy.
    chunk = min(rows, GPU_ROWS)
    widest_chunk = (rows - chunk) * model.hidden + chunk * 3 * model.intermediate
    mlp = 3 * stream + max(2 * stream, widest_chunk) + rows * model.expert_row
    return always + max(attention, mlp)
