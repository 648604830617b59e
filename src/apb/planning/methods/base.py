"""The planning side of a strategy: its options, its geometry, and its computation, communication and memory.

A strategy has two halves. The :class:`Method` here is a frozen dataclass without torch, used by plans, costs and the
command line. The class named by ``implementation``, a :class:`apb.strategies.Strategy`, computes the attention.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ...errors import InputError
from ..itinerary import Kind
from ..options import Checked, option

if TYPE_CHECKING:
    from ..network import Hosts, Sent
    from ..plan import Plan, Tokens
    from ..shape import ModelShape

# Below this many document tokens approximate prefill does not pay (paper, section 4): one block, full attention.
SHORTEST_WORTH_CUTTING = 8192
DEFAULT_BLOCKS = 8
# A merge by log-sum-exp holds the sum, the partial result being added and its weighted copy, in fp32: numbers of two
# bytes for each number of the output.
MERGING = 6


@dataclass(frozen=True)
class Method(Checked, ABC):
    """The planning side of a strategy; subclasses are frozen dataclasses whose fields are its options.

    An instance may leave options open (None). :meth:`settled` fills them in for a prompt, and a plan holds the settled
    one; all other methods expect a settled instance.

    Attributes:
        name: what ``--strategy`` and results call it.
        implementation: "module:Class" of the :class:`apb.strategies.Strategy` that attends.
        exact: True if the result is that of full attention whatever the options.
        in_rounds: True if its blocks can be read round by round.
        overlaps: True if it computes while keys and values are on their way.
        uses_ranks: True if more ranks share the work of the document's rows.
        passes: True if blocks pass pairs on, chosen by a compressor.
        blocks: number of blocks, if the method leaves the choice to the user.
        anchor_length: tokens of the anchor in front of every block but the first.
        passing_length: key/value pairs per KV head that a block passes on to later blocks, at most.
        passing_budget: passed pairs per KV head that a block sees, at most; None without a limit.
        question_first: True if the question is asked before the document as well, as part of the prefix.
    """

    name: ClassVar[str]
    implementation: ClassVar[str]
    exact: ClassVar[bool] = False
    in_rounds: ClassVar[bool] = False
    overlaps: ClassVar[bool] = False
    uses_ranks: ClassVar[bool] = True
    passes: ClassVar[bool] = False

    question_first: bool = option(
        False, "Ask the question before the document as well as after it.", kind=bool, keyword=True
    )

    # Options of some methods; these stand for them in the others.
    blocks = 1
    anchor_length = 0
    passing_length = 0
    passing_budget: int | None = None

    # -- geometry ----------------------------------------------------------------------------------------------------

    def settled(self, prefix: int, document: int, query: int, ranks: int) -> Self:
        """This method with every open option filled in for such a prompt; InputError if that is impossible."""
        return self

    def unasked(self, plan: Plan) -> Self:
        """This method for a document that is read before its questions are known; ``plan``: if they were."""
        return self

    def block_count(self, ranks: int) -> int:
        """Number of blocks that the document is cut into on ``ranks`` ranks."""
        return self.blocks

    def is_exact(self, plan: Plan) -> bool:
        """True if the plan's result is that of full attention, as with a single block."""
        return self.exact or plan.blocks == 1

    def anchored(self, plan: Plan) -> int:
        """True positions [0, anchored) are in the anchor; they are never selected for passing."""
        return self.anchor_length

    def anchor_tokens(self, plan: Plan, prefix: Tokens, document: Tokens, query: Tokens) -> Tokens:
        """The tokens at positions 0, 1, ... of the anchor, at least ``anchor_length`` of them."""
        return prefix + document + query

    def anchor_share(self, plan: Plan, rank: int) -> tuple[int, int]:
        """Positions [start, stop) of the anchor whose rows a rank computes; by default the ranks' shares tile it."""
        return self.anchor_length * rank // plan.ranks, self.anchor_length * (rank + 1) // plan.ranks

    def passed(self, plan: Plan, index: int) -> int:
        """Pairs per KV head that block ``index`` passes on; 0 for the last block."""
        if index == plan.blocks - 1:
            return 0
        return min(self.passing_length, plan.selectable(plan.block(index)))

    def contexts(self, plan: Plan) -> list[int]:
        """For each block, the number of pairs beside its own that each of its rows attends to.

        By default, as in APB: the anchor and the pairs of earlier blocks. Block 0 sees neither: it holds the prefix and
        the anchor's document tokens itself. An exact method's blocks see all tokens before them.
        """
        if self.exact:
            return [plan.block(index).start for index in range(plan.blocks)]
        found, before = [0], self.anchor_length
        for index in range(plan.blocks - 1):
            before += self.passed(plan, index)
            found.append(before)
        return found

    # -- cost --------------------------------------------------------------------------------------------------------

    def attended(self, plan: Plan, rank: int, heads: int) -> int:
        """Query-key pairs that a rank computes for the rows of anchor and blocks, summed over heads, in one layer."""
        contexts = plan.contexts()
        pairs = 0
        for span in plan.document_spans(rank):
            if span.kind is Kind.ANCHOR:
                pairs += (span.stop * (span.stop + 1) - span.start * (span.start + 1)) // 2
            else:
                pairs += self.block_pairs(len(span), contexts[span.block])
        return heads * pairs

    def block_pairs(self, length: int, context: int) -> int:
        """Query-key pairs of one head for a block of ``length`` rows with ``context`` keys before them."""
        return length * (length + 1) // 2 + length * context

    def gathered(self, plan: Plan) -> tuple[int, ...]:
        """Pairs per KV head that each rank gives to a layer's all-gather, by round; shorter shares are padded."""
        return (0,) * plan.rounds

    def sent(self, plan: Plan, rank: int, model: ModelShape, element_bytes: int, hosts: Hosts) -> Sent:
        """Bytes that a rank sends in one layer for the rows of the document, in all rounds together."""
        return hosts.gather(sum(self.gathered(plan)) * model.pair_width * element_bytes)

    def held(self, plan: Plan, rank: int, rows: int, blocks: list[int], model: ModelShape, gathered: int) -> int:
        """Numbers alive in a layer's attention beside q, k, v and the output of all rows.

        Args:
            rows: all rows of the rank in this round; ``blocks``: the lengths of its blocks.
            gathered: this round's :meth:`gathered`.
        """
        longest, width = max(blocks, default=0), model.heads * model.head_dim
        return longest * width * (2 + MERGING if plan.blocks > 1 else 1)

    # -- checking ----------------------------------------------------------------------------------------------------

    def lossless(self, blocks: int) -> tuple[str, Method] | None:
        """(name, method) of options with which the result is that of full attention; None if there are none.

        ``apb check`` compares models by them: exact methods are their own, approximate ones may have a limit case.
        """
        return ("", self) if self.exact else None

    # -- fitting -----------------------------------------------------------------------------------------------------

    def check_model(self, heads: int, ranks: int) -> None:
        """DoesNotFit if a model with ``heads`` query heads (a rank's share) cannot be read on ``ranks`` ranks."""
        return None

    def on_ranks(self, ranks: int) -> Method:
        """The method to fall back on when ``ranks`` ranks share the work; by default this one."""
        return self

    def for_document(self, document: int) -> Method:
        """This method for a document of another length, its sizes open again."""
        return self


@dataclass(frozen=True)
class Blockwise(Method):
    """A method that leaves the number of blocks to the user and can read them in rounds."""

    in_rounds: ClassVar[bool] = True

    blocks: int | None = option(  # type: ignore[assignment]
        None, "Blocks the document is cut into. If left out 8 to 64 of 2,048 tokens under apb, 8 under star.", least=1
    )

    def settled(self, prefix: int, document: int, query: int, ranks: int) -> Self:
        """See :meth:`Method.settled`: the usual blocks, or the next multiple of the ranks; one for short documents."""
        blocks = self.blocks
        if blocks is None:
            blocks = 1 if document < SHORTEST_WORTH_CUTTING else ranks * -(-self.usual_blocks(document) // ranks)
        if blocks > document:
            raise InputError(
                f"{blocks} blocks were asked for but the document has {document} tokens; use at most {document} blocks."
            )
        return replace(self, blocks=blocks)

    def usual_blocks(self, document: int) -> int:
        """Number of blocks of a document of so many tokens, if the user leaves it open."""
        return DEFAULT_BLOCKS

    def reopened(self) -> Self:
        """This method with the options that depend on the document's length open again, but for ``blocks``."""
        return self

    def on_ranks(self, ranks: int) -> Method:
        """See :meth:`Method.on_ranks`: at least one block per rank."""
        return self if self.blocks is None else replace(self.reopened(), blocks=max(self.blocks, ranks))

    def for_document(self, document: int) -> Method:
        """See :meth:`Method.for_document`."""
        return replace(self.reopened(), blocks=None if self.blocks is None else min(self.blocks, document))
