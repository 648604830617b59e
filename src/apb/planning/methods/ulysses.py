"""Ulysses (arXiv 2309.14509): sequence and heads trade places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...errors import DoesNotFit
from ..network import Hosts, Sent
from .base import Method
from .ring import Ring

if TYPE_CHECKING:
    from ..plan import Plan
    from ..shape import ModelShape


@dataclass(frozen=True)
class Ulysses(Method):
    """Exact. Two all-to-alls a layer give each rank a share of the heads, over all rows, and take the outputs back."""

    name: ClassVar[str] = "ulysses"
    implementation: ClassVar[str] = "apb.strategies.ulysses:Ulysses"
    exact: ClassVar[bool] = True

    def block_count(self, ranks: int) -> int:
        """See :meth:`Method.block_count`."""
        return ranks

    def attended(self, plan: Plan, rank: int, heads: int) -> int:
        """See :meth:`Method.attended`: a share of the heads, over the rows of all blocks."""
        share = heads * (rank + 1) // plan.ranks - heads * rank // plan.ranks
        contexts = plan.contexts()
        return share * sum(self.block_pairs(len(block), contexts[block.index]) for block in plan.all_blocks())

    def sent(self, plan: Plan, rank: int, model: ModelShape, element_bytes: int, hosts: Hosts) -> Sent:
        """See :meth:`Method.sent`: q, k, v of its rows to the ranks that have the heads, and their outputs back."""
        rows = plan.rows_by_rank()
        share, kept = _shares(plan, model)
        numbers = [rows[rank] * (share + 2 * kept[other]) + rows[other] * share for other in range(plan.ranks)]
        return hosts.scatter(rank, [count * model.head_dim * element_bytes for count in numbers])

    def held(self, plan: Plan, rank: int, rows: int, blocks: list[int], model: ModelShape, gathered: int) -> int:
        """See :meth:`Method.held`: rows packed for the others, and all rows of its heads as they arrive."""
        width = model.heads * model.head_dim
        share, kept = _shares(plan, model)
        packed = rows * (width + 2 * sum(kept) * model.head_dim)
        received = rows * plan.ranks * (share + 2 * kept[rank]) * model.head_dim
        # Concatenated while both are alive; then beside the outputs, packed again and received.
        return max(packed + 2 * received, received + 3 * rows * width)

    def check_model(self, heads: int, ranks: int) -> None:
        """See :meth:`Method.check_model`: every rank takes the same number of query heads."""
        if heads % ranks:
            raise DoesNotFit(
                f"The strategy {self.name!r} needs query heads that divide by the ranks, and {heads} do not divide by "
                f"{ranks}; use another number of ranks, or the strategy 'ring'."
            )

    def on_ranks(self, ranks: int) -> Method:
        """See :meth:`Method.on_ranks`: ring, which fits any number of heads."""
        return Ring()


def _shares(plan: Plan, model: ModelShape) -> tuple[int, list[int]]:
    """Query heads of a rank, and the number of KV heads that each rank reads for them."""
    share, group = max(model.heads // plan.ranks, 1), model.heads // model.kv_heads
    return share, [len(kv_heads_of(rank * share, share, group)) for rank in range(plan.ranks)]


def kv_heads_of(first: int, count: int, group: int) -> list[int]:
    """KV heads that query heads [first, first + count) read, as an attention with grouped heads expects them."""
    per_head = [head // group for head in range(first, first + count)]
    kept = sorted(set(per_head))
    even = len(per_head) % len(kept) == 0
    regular = even and [kept[i // (count // len(kept))] for i in range(count)] == per_head
    return kept if regular else per_head
