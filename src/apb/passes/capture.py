"""Capture of a decode step as CUDA graphs.

On several ranks a step is a graph for every stretch between two messages, which are sent in the ordinary way: there a
lost rank is noticed, and torch.distributed can be taken down while graphs are alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.collectives import Group, Pending

# Steps run before a capture: the first ones compile kernels.
_WARM_UP = 2


class _Recording:
    """A step as a sequence of graphs with messages between them. All graphs share memory: their order is fixed."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self._memory = torch.cuda.graph_pool_handle()

    def begin(self) -> None:
        """Capture what follows, instead of running it."""
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._memory)

    def end(self) -> None:
        """The last capture is complete."""
        self._graph.capture_end()
        self._steps.append(self._graph.replay)

    def between(self, send: Callable[[], object]) -> None:
        """Have ``send`` called in every replay between what has been captured and what follows, and not yet."""
        self.end()
        self._steps.append(send)
        self.begin()

    def replay(self) -> None:
        """Do it all, on the current stream."""
        for step in self._steps:
            step()


@dataclass(frozen=True)
class _Silent(Group):
    """As many ranks, where every rank takes the others' contributions to equal its own: nothing is sent."""

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`."""
        return Pending(torch.stack([x] * self.size, out=into))


@dataclass(frozen=True, kw_only=True)
class _Recorded(Group):
    """The ranks of ``real`` while a step is captured: their all-gathers are recorded."""

    real: Group
    recording: _Recording

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`; ``x`` and the result stay where they are."""
        message, result = x.contiguous(), x.new_empty((self.size, *x.shape)) if into is None else into
        real = self.real  # not this object: the recording it knows would know it, and its memory be freed late
        self.recording.between(lambda: real.all_gather(message, result).wait())
        return Pending(result)


def captured(run: Callable[[Group], Tensor], group: Group, device: torch.device) -> Callable[[], Tensor]:
    """Capture ``run``; the result replays it by graphs, with its all-gathers between them.

    ``run`` is called before the capture, and calling it again must do no harm. Nothing is sent meanwhile: other ranks
    may have captured theirs already.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):  # each writes the same slot, which the first real step overwrites
            run(_Silent(group.rank, group.size))
        # As torch.cuda.graph does: nothing is under way, and what is kept for later may be the graphs'.
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        recording = _Recording()
        recording.begin()
        try:
            several = group.size > 1
            result = run(_Recorded(group.rank, group.size, real=group, recording=recording) if several else group)
        finally:
            recording.end()
    torch.cuda.current_stream(device).wait_stream(side)

    def replay() -> Tensor:
        recording.replay()
        return result.clone()

    return replay
