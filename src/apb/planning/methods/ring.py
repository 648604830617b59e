"""Ring attention (arXiv 2310.01889) with zigzag blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..network import Hosts, Sent
from .base import MERGING, Method

if TYPE_CHECKING:
    from ..plan import Plan
    from ..shape import ModelShape


@dataclass(frozen=True)
class Ring(Method):
    """Exact. Every rank holds an early and a late block; keys and values travel round the ring."""

    name: ClassVar[str] = "ring"
    implementation: ClassVar[str] = "apb.strategies.ring:Ring"
    exact: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True

    def block_count(self, ranks: int) -> int:
        """See :meth:`Method.block_count`."""
        return 2 * ranks

    def sent(self, plan: Plan, rank: int, model: ModelShape, element_bytes: int, hosts: Hosts) -> Sent:
        """See :meth:`Method.sent`: the longest rank's keys and values, passed on in every step but the last."""
        total = (plan.ranks - 1) * max(plan.rows_by_rank()) * model.pair_width * element_bytes
        return Sent(total, total if hosts.apart(rank, (rank + 1) % plan.ranks) else 0)

    def held(self, plan: Plan, rank: int, rows: int, blocks: list[int], model: ModelShape, gathered: int) -> int:
        """See :meth:`Method.held`: keys and values at hand and arriving; the output in fp32 and a step's addition."""
        return 2 * rows * model.pair_width + rows * model.heads * model.head_dim * (2 + 1 + MERGING)
