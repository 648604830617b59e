"""APB (arXiv 2502.12085): anchors that include the query, and key/value pairs passed from block to block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Self

from ...errors import LARGEST, InputError
from ..options import option
from .base import MERGING, Blockwise, Method

if TYPE_CHECKING:
    from ..network import Hosts, Sent
    from ..plan import Plan, Tokens
    from ..shape import ModelShape

# Blocks this long lose nothing to full attention on a public checkpoint at 32K tokens, the question in front of it as
# well, and are the fastest there (benchmarks/results/real_models.md). The paper's table 8 has eight blocks whatever the
# length; more than these have not been measured.
BLOCK_LENGTH = 2048
MOST_BLOCKS = 64
# Defaults of the paper's table 8: anchor = block / 4, passing = block / 8, both capped.
LARGEST_ANCHOR = 8192
LARGEST_PASSING = 8192


@dataclass(frozen=True)
class APB(Blockwise):
    """Every block sees the anchor (prefix, query, first document tokens), the pairs of earlier blocks, and itself."""

    name: ClassVar[str] = "apb"
    implementation: ClassVar[str] = "apb.strategies.apb:APB"
    overlaps: ClassVar[bool] = True
    passes: ClassVar[bool] = True

    anchor_length: int | None = option(  # type: ignore[assignment]
        None,
        "Tokens of the anchor, 0 for none. If left out a quarter of a block under apb, all of block 1 under star.",
        least=0,
    )
    passing_length: int | None = option(  # type: ignore[assignment]
        None, "Pairs a block passes on under apb, per KV head; an eighth of a block if left out.", least=0
    )
    passing_budget: int | None = option(
        None,
        "Pairs a block sees under apb of all that earlier ones pass on, per KV head: the best; all if left out.",
        least=1,
    )

    def settled(self, prefix: int, document: int, query: int, ranks: int) -> Self:
        """See :meth:`Method.settled`: the paper's table 8 for the lengths left open."""
        method = super().settled(prefix, document, query, ranks)
        assert method.blocks is not None, "settled by Blockwise"
        if method.blocks == 1:
            return replace(method, anchor_length=0, passing_length=0)
        block, anchor, passing = document // method.blocks, self.anchor_length, self.passing_length
        if anchor is None:
            anchor = max(min(block // 4, LARGEST_ANCHOR), prefix + query)
        elif 0 < anchor < prefix + query:
            raise InputError(
                f"An anchor of {anchor} tokens does not hold the prefix ({prefix}) and the query ({query}); "
                f"make the anchor at least {prefix + query} tokens long or shorten the query."
            )
        if passing is None:
            passing = min(block // 8, LARGEST_PASSING)
        return replace(method, anchor_length=min(anchor, prefix + document + query), passing_length=passing)

    def unasked(self, plan: Plan) -> Self:
        """See :meth:`Method.unasked`: half of a block is passed on, if the length is left open.

        What a later question will look at is not known, and the time of one prefill is shared by all of them.
        """
        if self.passing_length is not None or plan.blocks == 1:
            return self
        return replace(self, passing_length=min(plan.document // plan.blocks // 2, LARGEST_PASSING))

    def usual_blocks(self, document: int) -> int:
        """See :meth:`Blockwise.usual_blocks`: of ``BLOCK_LENGTH`` tokens each, from 8 to ``MOST_BLOCKS``."""
        return min(max(super().usual_blocks(document), round(document / BLOCK_LENGTH)), MOST_BLOCKS)

    def anchored(self, plan: Plan) -> int:
        """See :meth:`Method.anchored`: the anchor also includes the query, before the document's tokens."""
        return max(plan.anchor_length - plan.query, 0)

    def anchor_tokens(self, plan: Plan, prefix: Tokens, document: Tokens, query: Tokens) -> Tokens:
        """See :meth:`Method.anchor_tokens`."""
        return prefix + query + document[: plan.anchored]

    def contexts(self, plan: Plan) -> list[int]:
        """See :meth:`Method.contexts`: what earlier blocks pass on, within the budget."""
        found = super().contexts(plan)
        if self.passing_budget is None:
            return found
        return [min(seen, plan.anchor_length + self.passing_budget) for seen in found]

    def gathered(self, plan: Plan) -> tuple[int, ...]:
        """See :meth:`Method.gathered`: a rank's share of the anchor in the first round, and its blocks' pairs."""
        return _gathered(plan)

    def sent(self, plan: Plan, rank: int, model: ModelShape, element_bytes: int, hosts: Hosts) -> Sent:
        """See :meth:`Method.sent`: where pairs compete for a budget, an fp32 score beside each pair of a KV head."""
        pair = model.pair_width * element_bytes + (0 if plan.competing is None else model.kv_heads * 4)
        return hosts.gather(sum(self.gathered(plan)) * pair)

    def held(self, plan: Plan, rank: int, rows: int, blocks: list[int], model: ModelShape, gathered: int) -> int:
        """See :meth:`Method.held`: pairs packed, gathered, in order and chosen, and partial results being merged."""
        if plan.blocks == 1:
            return super().held(plan, rank, rows, blocks, model, gathered)
        longest, width = max(blocks, default=0), model.heads * model.head_dim
        # Where pairs compete a block reads the anchor apart from those that it sees: a partial result more.
        chosen, more = (0, 0) if plan.competing is None else (len(blocks) * plan.competing, 1)
        merging = longest * width * (2 + more + MERGING)
        if plan.ranks > 1:  # attention to other ranks' pairs is computed apart from that to the block itself
            merging = rows * width + longest * width * (2 * more + MERGING)
        return ((1 + 2 * plan.ranks) * gathered + chosen) * model.pair_width + merging

    def lossless(self, blocks: int) -> tuple[str, Method] | None:
        """See :meth:`Method.lossless`: without an anchor and with every pair passed on."""
        everything = replace(self, blocks=blocks, anchor_length=0, passing_length=LARGEST, passing_budget=None)
        return "everything passed", everything

    def reopened(self) -> Self:
        """See :meth:`Blockwise.reopened`."""
        return replace(self, anchor_length=None, passing_length=None)

    def on_ranks(self, ranks: int) -> Method:
        """See :meth:`Method.on_ranks`: the lengths stay, unless they were meaningless with a single block."""
        if self.blocks is None or self.blocks == 1:
            return super().on_ranks(ranks)
        return replace(self, blocks=max(self.blocks, ranks))


@lru_cache(maxsize=8)  # asked for by every rank of a plan
def _gathered(plan: Plan) -> tuple[int, ...]:
    if plan.blocks == 1:
        return (0,) * plan.rounds
    widths = [[0] * plan.ranks for _ in range(plan.rounds)]
    for rank in range(plan.ranks):
        start, stop = plan.anchor_share(rank)
        widths[0][rank] += stop - start
        for block in plan.owned(rank):
            widths[block.round][rank] += plan.passed(block.index)
    return tuple(max(width) for width in widths)
