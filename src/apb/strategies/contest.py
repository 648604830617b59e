"""The pairs that blocks see where not all that earlier blocks offer fit into a budget."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.selection import choose


@dataclass
class Contest:
    """The blocks of a round that cannot see all pairs that stand before their own, and how many these are.

    The best of them are chosen for every block apart, as if it were alone: for all blocks at once, in one launch. Of
    the block directly before, an edge is seen whatever its scores.

    Attributes:
        blocks: indexes of the blocks; after the last one may come -1, which stands for the next round's first block.
        ends: for each the number of columns of pairs before its own, more than the budget.
        edges: for each the number of pairs that come first, the last of those columns.
        budget: pairs that a block sees of them.
    """

    blocks: tuple[int, ...]
    ends: tuple[int, ...]
    edges: tuple[int, ...]
    budget: int
    # (2, blocks, 1, 1): what every layer reads, on its device, so that none waits for a copy.
    _limits: Tensor | None = field(default=None, init=False)

    def columns(self, scores: Tensor) -> Tensor:
        """Of pairs' scores (kv_heads, columns) fp32 the best columns (blocks, kv_heads, budget) int64, ascending."""
        if not self.blocks:
            return torch.empty(0, len(scores), self.budget, dtype=torch.int64, device=scores.device)
        if self._limits is None or self._limits.device != scores.device:
            self._limits = torch.tensor([self.ends, self.edges], device=scores.device)[:, :, None, None]
        ends, edges = self._limits
        columns = torch.arange(scores.shape[1], device=scores.device)
        # Columns of later blocks rank below all others, and of equal ones the first is taken.
        order = torch.where(columns < ends, torch.inf, -torch.inf)
        order = torch.where(columns < ends - edges, scores, order)
        chosen = choose(order.flatten(0, 1), self.budget, scores.shape[1], pooled=False)
        return chosen.unflatten(0, (len(self.blocks), -1))


def kept(each: Tensor, first: int, columns: Tensor | None) -> Tensor:
    """Of (n, kv_heads, pairs, width) the pairs before ``first`` and the columns (kv_heads, budget); None: all."""
    if columns is None:
        return each
    chosen = each.gather(2, columns[None, :, :, None].expand(len(each), -1, -1, each.shape[3]))
    return torch.cat([each[:, :, :first], chosen], 2)
