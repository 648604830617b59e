"""What a prefill holds at its widest moment, beside weights and cache: what is alive at once in a layer.

In numbers (elements of the model's dtype), for a rank's rows of one round. Two moments compete: attention, when q, k,
v, the residual stream and its normed copy are alive with what the strategy merges; and the MLP, which works on chunks
of rows, when its chunks are put together.
"""

from __future__ import annotations

from .plan import Kind, Plan
from .shape import ModelShape

# Rows that a dense MLP works on at a time: on the CPU its intermediate values stay in the cache, on a GPU a chunk still
# fills the device.
CPU_ROWS = 2048
GPU_ROWS = 16384
# fp32 partial results counted in numbers of two bytes, as merging holds them: two outputs, and one being added.
_MERGING = 6


def activations(plan: Plan, rank: int, round: int, model: ModelShape, gathered: int) -> int:
    """Numbers alive at the widest moment of a rank's layer; ``gathered``: pairs a rank gives to the collective."""
    spans = plan.spans(rank, round)
    rows = sum(map(len, spans))
    blocks = [len(span) for span in spans if span.kind is Kind.BLOCK]
    head = model.heads * model.head_dim
    q_k_v = rows * (head + model.pair_width)
    stream = 2 * rows * model.hidden
    attention = stream + q_k_v + rows * head + _strategy(plan, rows, blocks, model, gathered)
    mlp = 2 * stream + min(rows, GPU_ROWS) * 3 * model.intermediate + rows * model.expert_row
    return max(attention, mlp)


def _strategy(plan: Plan, rows: int, blocks: list[int], model: ModelShape, gathered: int) -> int:
    """What a strategy holds beside q, k, v and the output of all rows."""
    head, pair = model.heads * model.head_dim, model.pair_width
    longest = max(blocks, default=0)
    if plan.strategy == "ring":
        # Keys and values here, sent and arriving; the whole output in fp32, and what a step adds to it.
        return 3 * rows * pair + rows * head * (2 + 1 + _MERGING)
    if plan.method.scatters_heads:
        # Packed, as sent, as received, and apart again; the outputs the same way back.
        return 3 * rows * (head + pair) + 3 * rows * head
    if plan.method.passes and plan.blocks > 1:
        # With others to wait for, what blocks see of them comes apart from what they see of themselves.
        merging = rows * head + longest * head * _MERGING if plan.ranks > 1 else longest * head
        return (1 + 2 * plan.ranks) * gathered * pair + merging
    return longest * head + (longest * head * _MERGING if plan.blocks > 1 else 0)
