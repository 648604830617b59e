"""Attention of the strategies in prefill: one file each; their planning side is in :mod:`apb.planning.methods`."""

from __future__ import annotations

from importlib import import_module

from ..compressors import Compressor
from ..distributed.collectives import Group
from ..layers.base import AttentionInput
from ..planning.plan import Plan
from .base import OnSelection, Strategy

__all__ = ["AttentionInput", "OnSelection", "Strategy", "make_strategy"]


def make_strategy(plan: Plan, group: Group, compressor: Compressor, backend: str = "auto") -> Strategy:
    """The strategy of a plan's method, for this rank."""
    module, _, name = plan.method.implementation.partition(":")
    kind: type[Strategy] = getattr(import_module(module), name)
    return kind(plan, group, compressor, backend)
