"""The methods of prefill: one file each, one line here and one in methods.METHODS."""

from __future__ import annotations

from ..compressors import Compressor
from ..distributed.collectives import Group
from ..planning.plan import Plan
from .apb import APB
from .base import Layer, OnSelection, Strategy
from .full import Full
from .minference import MInference
from .ring import Ring
from .star import Star
from .ulysses import Ulysses

__all__ = ["STRATEGIES", "Layer", "OnSelection", "Strategy", "make_strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    "apb": APB,
    "full": Full,
    "minference": MInference,
    "ring": Ring,
    "star": Star,
    "ulysses": Ulysses,
}


def make_strategy(plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> Strategy:
    """The strategy that a plan names, for this rank."""
    return STRATEGIES[plan.strategy](plan, group, compressor, backend)
