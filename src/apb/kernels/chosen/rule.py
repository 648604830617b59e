"""Which units of keys a token attends to, given what each promises: the best ones that a budget has room for."""

from __future__ import annotations

import torch
from torch import Tensor

# A unit's place is made of its score's bits, so that the kernels find the last one that fits by counting, in two
# rounds. Scores between -1024 and -1/64 keep 18 digits of the fraction; those beyond stand at either end.
DROPPED = 5
DIGITS = 11
LEAST_SCORE, MOST_SCORE = -1024.0, -1 / 64
FIRST = int(torch.tensor(-MOST_SCORE).view(torch.int32)) >> DROPPED
LAST = (1 << 2 * DIGITS) - 1


def places(scores: Tensor) -> Tensor:
    """int32 places of scores, fp32 logarithms of shares: the higher the score, the lower the place; nan is last."""
    bits = (-scores).clamp(min=0).abs().view(torch.int32) >> DROPPED
    return (bits - FIRST).clamp(0, LAST)


def within(scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """The best units that a budget has room for, at least the very best; units of one place are in or out together.

    Args:
        scores: (problems, units) fp32, logarithms of shares.
        sizes: (problems, units) integers, the keys of each unit.
        budget: keys of every problem.

    Returns:
        (problems, units) bool.
    """
    order, index = places(scores).sort(1)
    ends = torch.ones_like(order, dtype=torch.bool)
    ends[:, :-1] = order[:, 1:] != order[:, :-1]
    fits = ends & (sizes.gather(1, index).cumsum(1) <= budget)
    last = order.where(fits, -1).amax(1, keepdim=True).maximum(order[:, :1])
    return places(scores) <= last
