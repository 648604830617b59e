"""Which passages of a document its blocks passed on, counted while it is read.

Every layer and KV head of a block passes its own choice of tokens on. Shown are as many as one of them passes: those
that most of them chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import Engine
from ..explanation import GAP, runs
from ..planning.plan import Plan
from ..session import Session
from .answers import Passed


class Passing:
    """Counts, on each rank, how many layers and KV heads pass each token of its blocks on."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tokens: dict[torch.device, Tensor] = {}  # layers may lie on several devices
        self._heads: dict[int, int] = {}

    def seen(self, layer: int, block: int, positions: Tensor) -> None:
        """The positions (kv_heads, count) that the KV heads of a layer pass on, of one block."""
        chosen = positions.flatten()
        if chosen.device not in self._tokens:
            self._tokens[chosen.device] = torch.zeros(self._plan.query_start, device=chosen.device)
        self._tokens[chosen.device].index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
        self._heads[block] = self._heads.get(block, 0) + len(positions)

    def found(self, engine: Engine, session: Session) -> Passed:
        """What was passed on, in positions of the prompt. Every rank must call it, and all get the same."""
        plan, end = self._plan, self._plan.query_start
        passages: list[tuple[int, int, float]] = []
        if plan.method.passes:
            counts = torch.zeros(end + plan.blocks, device=engine.device)
            for each in self._tokens.values():
                counts[:end] += each.to(engine.device)
            for block, heads in self._heads.items():
                counts[end + block] += heads
            counts = engine.mesh.everyone.sum(counts).cpu()
            for span in map(plan.block, range(plan.blocks)):
                share = counts[span.start : span.stop] / counts[end + span.index].clamp(min=1)
                first = share.sort(descending=True, stable=True).indices[: plan.passed(span.index)]
                most = first[share[first] > 0].sort().values.tolist()
                for start, stop in runs(most, GAP):
                    passages.append((span.start + start, span.start + stop, float(share[start:stop].max())))
        upper = session.positions(max(session.cache.indices)) if plan.going_on < plan.document else []
        return Passed(passages, runs(upper))
