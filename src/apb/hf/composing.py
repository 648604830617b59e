"""Gated delta nets, read so that their runs of rows can be composed, by their own modules' code.

The rule of the module's recurrence, a function of its modeling module, is called with values that are wider by the
keys' width: by columns of zeros, which begin from the identity. The rule treats all columns of values and state alike,
so that it gives beside its outputs and its final state, from zero, how both depend on the state before the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.composing import Composable, Starts, after
from ..planning.runs import LEAST_COMPOSED

_RULE = "torch_chunk_gated_delta_rule"

# A rule as modules call it; what stands in for it, which is given the rule first.
Rule = Callable[..., tuple[Tensor, Tensor | None]]
# Calls a module's code with rows (1, n, width) and a state, which it carries on; the output of these rows.
Read = Callable[[Tensor, Any], Tensor]


def composable(module: nn.Module, forward: Callable[..., Any]) -> Callable[[Read], Composable] | None:
    """How to compose the runs of a recurrent module, whose code is ``forward``, by what reads rows with it; None if it
    does not call the rule that can be composed.
    """
    code = inspect.unwrap(forward)
    names = getattr(getattr(code, "__code__", None), "co_names", ())
    if _RULE not in names or _RULE not in code.__globals__:
        return None
    names = ("conv_kernel_size", "num_v_heads", "head_k_dim", "head_v_dim")
    kernel, heads, key_dim, value_dim = (int(getattr(module, name)) for name in names)
    if kernel - 1 > LEAST_COMPOSED:
        return None

    def by(read: Read) -> Composable:
        def read_runs(rows: Tensor, pieces: Sequence[tuple[int, int]], state: Any, starts: Starts) -> Tensor:
            with _replaced(code.__globals__, partial(_composed, pieces, starts)):
                return read(rows, state)

        return Composable(kernel - 1, heads, key_dim, value_dim, read_runs)

    return by


def _composed(
    pieces: Sequence[tuple[int, int]],
    starts: Starts,
    rule: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What the rule returns for runs of rows, see :attr:`Composable.read`, one after the other."""
    (_, _, heads, width), depth = value.shape, key.shape[-1]
    identity = torch.eye(depth, device=value.device).expand(1, heads, depth, depth)
    identity = F.pad(identity, (width, 0))
    outs, effects, at = [], [], 0
    for before, length in pieces:
        rows = slice(at + before, at + before + length)
        at = rows.stop
        out, effect = rule(
            query[:, rows],
            key[:, rows],
            F.pad(value[:, rows], (0, depth)),
            g=g[:, rows],
            beta=beta[:, rows],
            initial_state=identity,
            output_final_state=True,
            **options,
        )
        assert effect is not None, "asked for"
        outs.append(out[0].transpose(0, 1))
        effects.append(effect[0].float())
    begun = starts(torch.stack(effects), None if initial_state is None else initial_state[0].float())
    result, at = value.new_zeros(value.shape), 0
    for (before, length), out, start in zip(pieces, outs, begun, strict=True):
        own, moved = out.split([width, depth], -1)
        rows = slice(at + before, at + before + length)
        at = rows.stop
        result[0, rows] = own.baddbmm_(moved, start.to(out.dtype)).transpose(0, 1)
    return result, after(effects[-1], begun[-1])[None]


class _Switch:
    """Stands where modules look for a rule: calls what the thread has put in its place, else the rule itself."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.uses = 0

    def __call__(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        chosen = _chosen.get()
        return self.rule(*args, **options) if chosen is None else chosen(self.rule, *args, **options)


_chosen: ContextVar[Rule | None] = ContextVar("rule", default=None)
_lock = Lock()


@contextmanager
def _replaced(known: dict[str, Any], rule: Rule) -> Iterator[None]:
    """Within it modules whose code has these globals call another rule; those that other threads run do not."""
    with _lock:
        if not isinstance(known[_RULE], _Switch):
            known[_RULE] = _Switch(known[_RULE])
        switch = known[_RULE]
        switch.uses += 1
    token = _chosen.set(rule)
    try:
        yield
    finally:
        _chosen.reset(token)
        with _lock:
            switch.uses -= 1
            if not switch.uses:
                known[_RULE] = switch.rule
