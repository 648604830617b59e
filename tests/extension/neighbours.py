"""A strategy that the package does not know: every block sees itself and the end of the block before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apb.kernels.attention import Part, Task
from apb.layers.base import AttentionInput
from apb.methods import Blockwise, option
from apb.planning.plan import Plan
from apb.strategies import Strategy
from apb.strategies.base import Visible, causal


@dataclass(frozen=True)
class Neighbours(Blockwise):
    """``reach`` pairs of the block before are seen beside a block itself."""

    name: ClassVar[str] = "neighbours"
    implementation: ClassVar[str] = "extension.neighbours:NeighboursAttention"
    in_rounds: ClassVar[bool] = False

    reach: int = option(8, "Tokens at the end of the block before that a block sees.", least=0)

    def contexts(self, plan: Plan) -> list[int]:
        return [min(self.reach, len(plan.block(index - 1))) if index else 0 for index in range(plan.blocks)]

    def gathered(self, plan: Plan) -> tuple[int, ...]:
        if plan.blocks == 1:
            return (0,)
        ends = [sum(min(self.reach, len(block)) for block in plan.owned(rank)) for rank in range(plan.ranks)]
        return (max(ends),)


class NeighboursAttention(Strategy):
    """One all-gather a layer carries the ends of all blocks."""

    method: Neighbours

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        pairs, starts = self._ends(layer)
        tasks = []
        for span in self.blocks:
            seen = self.plan.contexts()[span.block]
            before = (Part(1, starts[span.block - 1], seen, causal=False),) if seen else ()
            tasks.append(Task(*span.bounds, (Part(0, span.row, len(span), causal=True), *before)))
        self.batched(layer, [(layer.k, layer.v), (pairs[0], pairs[1])], tasks, out)

    def _ends(self, layer: AttentionInput) -> tuple[Tensor, dict[int, int]]:
        """The ends of all blocks (2, pairs, kv_heads, head_dim), and where each begins."""
        width = self.method.gathered(self.plan)[0]
        message = layer.k.new_zeros(2, width, *layer.k.shape[1:])
        row = 0
        for span in self.blocks if self.plan.blocks > 1 else ():
            count = min(self.method.reach, len(span))
            end = slice(span.rows.stop - count, span.rows.stop)
            message[0, row : row + count], message[1, row : row + count] = layer.k[end], layer.v[end]
            row += count
        gathered = self.group.all_gather(message).wait()  # (ranks, 2, width, kv_heads, head_dim)
        starts = {}
        for rank in range(self.plan.ranks):
            row = rank * width
            for block in self.plan.owned(rank):
                starts[block.index] = row
                row += min(self.method.reach, len(block))
        return gathered.transpose(0, 1).flatten(1, 2), starts

    def visible(self, layer: AttentionInput) -> Visible:
        starts = torch.tensor([self.plan.block(index).start for index in range(self.plan.blocks)])
        contexts = torch.tensor(self.plan.contexts())

        def visible(kv_head: int, heads: slice, rows: Tensor, keys: int) -> Tensor:
            owner = torch.bucketize(rows, starts, right=True) - 1
            first = starts[owner] - contexts[owner]
            return causal(kv_head, heads, rows, keys) & (torch.arange(keys) >= first[:, None])

        return visible


class SilentAttention(NeighboursAttention):
    """The same, which does not say what its rows see."""

    def visible(self, layer: AttentionInput) -> Visible:
        return Strategy.visible(self, layer)
