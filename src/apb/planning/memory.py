"""Peak activations of a prefill, beside weights and cache, for a rank's rows of one round.

In numbers (elements of the model's dtype). The peak is in one of two places: attention, when q, k, v, the residual
stream and its normed copy are alive with the partial results that the strategy merges; or the MLP, which works on
chunks of rows, in its last chunk or when its chunks are concatenated; or a recurrent layer, which does so too.
tests/distributed/test_several_ranks.py counts live tensors.
"""

from __future__ import annotations

from .itinerary import Kind
from .plan import Plan
from .runs import GPU_COMPOSED, rows_composed
from .shape import ModelShape

# Rows that a dense MLP works on at a time: on the CPU its intermediate values stay in the cache, on a GPU a chunk still
# fills the device.
CPU_ROWS = 2048
GPU_ROWS = 16384
# Numbers alive in a recurrent layer for a row, over those that its linear maps write: counted in transformers' gated
# delta nets (Qwen3.5: 3.6, OLMo-Hybrid: 2.8) where the kernels of flash-linear-attention hold most.
ALIVE_IN_RECURRENCE = 4
# The same where runs are composed, all rows of a rank at once, with values and states twice as wide: counted on the CPU
# in transformers' own functions, which hold more than those kernels (Qwen3.5: 5.7, OLMo-Hybrid: 4.1).
ALIVE_IN_COMPOSITION = 6


def activations(
    plan: Plan, rank: int, round: int, model: ModelShape, gathered: int, most_composed: int = GPU_COMPOSED
) -> int:
    """Numbers alive at the peak of a rank's layer; ``gathered``: pairs that a rank gives to the collective.

    ``most_composed``: see :func:`apb.planning.runs.composed`.
    """
    spans = plan.spans(rank, round)
    rows = sum(map(len, spans))
    blocks = [len(span) for span in spans if span.kind is Kind.BLOCK]
    width = model.heads * model.head_dim
    q_k_v = rows * (width + model.pair_width)
    # Alive through all layers: the embedded rows, sines and cosines of their positions.
    always = rows * (model.hidden + 2 * model.head_dim)
    stream = rows * model.hidden
    attention = 2 * stream + q_k_v + rows * width + plan.method.held(plan, rank, rows, blocks, model, gathered)
    # The layer's input is still alive beside the sum after attention and its normed copy.
    chunk = min(rows, GPU_ROWS)
    widest_chunk = (rows - chunk) * model.hidden + chunk * 3 * model.intermediate
    mlp = 3 * stream + max(2 * stream, widest_chunk) + rows * model.expert_row
    if model.recurrent is None:
        return always + max(attention, mlp)
    # Its input, the normed copy, its output, and the pieces that this is put together from.
    row = model.recurrent.written // model.recurrent.layers
    recurrent = 4 * stream + chunk * ALIVE_IN_RECURRENCE * row
    if model.recurrent.effect:
        composed = rows_composed(plan, rank, round, most_composed)
        # The rows before a run and its own are copied into one piece.
        recurrent = max(recurrent, 4 * stream + composed * (model.hidden + ALIVE_IN_COMPOSITION * row))
    return always + max(attention, mlp, recurrent)
