"""Star Attention (arXiv 2411.17116), first phase."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ...errors import InputError
from ..options import option
from .base import Blockwise

if TYPE_CHECKING:
    from ..plan import Plan


@dataclass(frozen=True)
class Star(Blockwise):
    """Every block sees the first block and itself; nothing is passed, and the anchor does not include the query."""

    name: ClassVar[str] = "star"
    implementation: ClassVar[str] = "apb.strategies.star:Star"

    # Sizes given for several strategies at once mean apb's anchor; star's is all of block 1.
    anchor_length: int | None = option(  # type: ignore[assignment]
        None, "Tokens of the anchor, the beginning of block 1; all of it if left out.", least=0, compared=False
    )

    def settled(self, prefix: int, document: int, query: int, ranks: int) -> Self:
        """See :meth:`Method.settled`: the anchor is all of block 1 unless a shorter one was asked for."""
        method = super().settled(prefix, document, query, ranks)
        assert method.blocks is not None, "settled by Blockwise"
        if method.blocks == 1:
            return replace(method, anchor_length=0)
        first_block = prefix + -(-document // method.blocks)
        asked = self.anchor_length
        if asked is not None and asked > first_block:
            raise InputError(
                f"An anchor of {asked} tokens is longer than the first block, whose beginning it is "
                f"({first_block} tokens); ask for at most that."
            )
        return replace(method, anchor_length=first_block if asked is None else asked)

    def anchor_share(self, plan: Plan, rank: int) -> tuple[int, int]:
        """See :meth:`Method.anchor_share`: all of it on every rank with blocks, except the one with block 0."""
        first = next(plan.owned(rank), None)
        return 0, self.anchor_length if first is not None and first.index else 0  # type: ignore[return-value]

    def reopened(self) -> Self:
        """See :meth:`Blockwise.reopened`."""
        return replace(self, anchor_length=None)
