"""Composition of recurrent layers: all ranks read their runs of rows at once, and none waits for another.

What a run of rows does to the state of a gated delta net (Yang et al., arXiv 2412.06464) is affine: S becomes M S + U,
and its outputs are o_U + o_M S. A rank reads its runs without the state before them, and has all four. The ranks then
exchange M and U, each composes those of the runs before its own to the states that these begin with, in fp32, and adds
o_M S to its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.collectives import Group
from ..planning.runs import Run
from ..timing import timed

# (U | M) of this rank's runs, (runs, heads, k, v + k) fp32, and the state (heads, k, v) before the round, None if there
# is none, to the state before each of them, (runs, heads, k, v) fp32.
Starts = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Composable:
    """A recurrent layer whose runs can be composed.

    Attributes:
        lookback: rows before a run that its first rows depend on beside the state.
        heads, key_dim, value_dim: of its states, (heads, key_dim, value_dim).
        read: reads rows (1, n, width), which are runs one after the other, each a tuple of how many rows of lookback it
            begins with and of its rows without them. It asks once what the runs begin with, and carries the state on
            from that before the round to that after the last run. The layer's output of all rows; what it says of
            lookback is meaningless.
    """

    lookback: int
    heads: int
    key_dim: int
    value_dim: int
    read: Callable[[Tensor, Sequence[tuple[int, int]], Any, Starts], Tensor]

    @property
    def effect(self) -> tuple[int, int, int]:
        """The shape of what a run does to the state, (U | M)."""
        return self.heads, self.key_dim, self.value_dim + self.key_dim


def after(effect: Tensor, state: Tensor) -> Tensor:
    """The state (heads, k, v) after a run, by what the run does to it, (heads, k, v + k): M S + U."""
    added, moved = effect.split([state.shape[-1], state.shape[-2]], -1)
    return torch.baddbmm(added, moved, state)


class Composition:
    """The runs of a round of a document, on one rank."""

    def __init__(self, runs: Sequence[Run], group: Group) -> None:
        self._runs = runs
        self._group = group
        by_rank = [[place for place, run in enumerate(runs) if run.rank == rank] for rank in range(group.size)]
        self._mine = by_rank[group.rank]
        # What ranks exchange has the same shape on all: that of the rank with most runs.
        self._slots = max(map(len, by_rank))
        self._slot = [by_rank[run.rank].index(place) for place, run in enumerate(runs)]

    def read(self, layer: Composable, hidden: Tensor, state: Any, out: Tensor) -> None:
        """Read this rank's runs into ``out``; every rank calls it.

        Args:
            layer: the layer.
            hidden: (1, rows, width) of this rank.
            state: that before the round; if this rank has the last run, it is carried on to that after it.
            out: (1, rows, width), of which the runs' rows are written.
        """
        lookbacks = self._lookbacks(hidden, layer.lookback)
        if not self._mine:
            self._exchange(hidden.new_empty((0, *layer.effect), dtype=torch.float32), layer)
            return
        parts: list[Tensor] = []
        pieces: list[tuple[int, int]] = []
        for place in self._mine:
            run = self._runs[place]
            before = lookbacks[place - 1] if place else hidden[0, :0]  # the first one's is in the state
            parts += [before[None], hidden[:, run.rows]]
            pieces.append((len(before), len(run)))
        rows = parts[1] if len(parts) == 2 and not pieces[0][0] else torch.cat(parts, 1)
        with timed("recurrent"):
            read = layer.read(rows, pieces, state, lambda effects, before: self._starts(effects, before, layer))
            at = 0
            for place, (skipped, length) in zip(self._mine, pieces, strict=True):
                out[:, self._runs[place].rows] = read[:, at + skipped : at + skipped + length]
                at += skipped + length

    def _lookbacks(self, hidden: Tensor, count: int) -> list[Tensor]:
        """The last ``count`` rows of each run."""
        mine = hidden.new_zeros(self._slots, count, hidden.shape[-1])
        for slot, place in enumerate(self._mine):
            mine[slot] = hidden[0, self._runs[place].rows][-count:] if count else mine[slot]
        with timed("communication"):
            found = self._group.all_gather(mine).wait()
        return [found[run.rank, slot] for run, slot in zip(self._runs, self._slot, strict=True)]

    def _starts(self, effects: Tensor, state: Tensor | None, layer: Composable) -> Tensor:
        found = self._exchange(effects, layer)
        if state is None:
            state = effects.new_zeros(layer.heads, layer.key_dim, layer.value_dim)
        starts = []
        for place, effect in enumerate(found[: self._mine[-1] + 1]):
            if place in self._mine:
                starts.append(state)
            state = after(effect, state)
        return torch.stack(starts)

    def _exchange(self, effects: Tensor, layer: Composable) -> list[Tensor]:
        """What each run does to the state."""
        if len(effects) < self._slots:
            effects = torch.cat([effects, effects.new_zeros(self._slots - len(effects), *layer.effect)])
        with timed("communication"):
            found = self._group.all_gather(effects).wait()
        return [found[run.rank, slot] for run, slot in zip(self._runs, self._slot, strict=True)]
