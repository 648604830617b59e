"""Capture of a decode step as CUDA graphs.

Messages that are kernels (see :mod:`apb.distributed.one_shot`) are captured. Where ranks have none, a step is one graph
for every stretch between two of the messages that merge attention over the ranks, which are sent outside the graphs: so
a lost rank is noticed. The messages of processes that share weights, two in every layer, are captured even if they are
NCCL's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import launch
from ..distributed.collectives import Group, Pending

# Steps run before a capture: the first ones compile kernels.
_WARM_UP = 2


class _Recording:
    """A step as a sequence of graphs with messages between them. All graphs share memory: their order is fixed."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self._memory = torch.cuda.graph_pool_handle()
        launch.before_leaving(self)

    def begin(self) -> None:
        """Begin to capture: what follows is recorded instead of run."""
        self._graph = torch.cuda.CUDAGraph()
        # NCCL's own thread asks for the progress of earlier messages meanwhile, which is nobody else's error.
        self._graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")

    def end(self) -> None:
        """End the last capture."""
        self._graph.capture_end()
        self._steps.append(self._graph.replay)

    def between(self, send: Callable[[], object]) -> None:
        """Record ``send``, to be called in every replay between the graphs before and after; it is not called now."""
        self.end()
        self._steps.append(send)
        self.begin()

    def replay(self) -> None:
        """Replay all graphs and messages on the current stream."""
        for step in self._steps:
            step()

    def give_up(self) -> None:
        """See :class:`apb.distributed.launch.Holder`: nothing can be replayed any more."""
        self._steps.clear()
        vars(self).pop("_graph", None)


@dataclass(frozen=True)
class _Silent(Group):
    """A group of as many ranks that sends nothing: every rank takes the others' contributions to equal its own."""

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`."""
        return Pending(torch.stack([x] * self.size, out=into))


@dataclass(frozen=True, kw_only=True)
class _Recorded(Group):
    """The ranks of ``real`` while a step is captured: their all-gathers are recorded."""

    real: Group
    recording: _Recording

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`; ``x`` and the result keep their addresses."""
        if self.real.in_kernels(x):
            return self.real.all_gather(x, into)
        message, result = x.contiguous(), x.new_empty((self.size, *x.shape)) if into is None else into
        real = self.real  # not self: a cycle with the recording would free its memory late
        self.recording.between(lambda: real.all_gather(message, result).wait())
        return Pending(result)


def captured(run: Callable[[Group], Tensor], group: Group, device: torch.device) -> Callable[[], Tensor]:
    """Capture ``run``; the result replays it by graphs, with its all-gathers between or in them.

    ``run`` is also called before the capture, so what it writes must be what the first replay overwrites, or what is
    written anew before it. Nothing is sent to other ranks of ``group`` meanwhile: they may have captured theirs
    already. Processes that share weights capture at the same time.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):  # each writes the same slot, which the first real step overwrites
            run(_Silent(group.rank, group.size))
        # As in torch.cuda.graph: wait for queued work, and free cached memory for the graphs.
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
