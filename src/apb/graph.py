"""One decode step on a GPU: its lengths lie in the GPU's memory, so that the same CUDA graphs serve every step.

On several ranks a step is a graph for every stretch between two messages, which are sent in the ordinary way: there a
lost rank is noticed, and torch.distributed can be taken down while graphs are alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .distributed.collectives import Group, Pending
from .hf import rope
from .hf.attach import Attachment
from .hf.cache import ShardCache
from .kernels import fused
from .strategies.base import Layer, merge_over_ranks

# Steps run before a capture: the first ones compile kernels and set up communication.
_WARM_UP = 2
# RoPE variants that look at the largest position on the host, which a graph cannot do.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def why_not(attachment: Attachment, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why steps run as ordinary passes; None where they can be those of a :class:`Step`."""
    if device.type != "cuda":
        return f"device type {device.type} has no graphs"
    if len(attachment.devices) > 1:
        return f"layers lie on {len(attachment.devices)} devices"
    if attachment.peculiar:
        return f"layers have {', '.join(sorted(attachment.peculiar))}"
    sets = rope.parameter_sets(attachment.model.config.get_text_config()).values()
    changing = sorted({rope.kind(parameters) for parameters in sets} & set(_LENGTH_DEPENDENT))
    if changing:
        return f"RoPE of type {' and '.join(changing)} depends on the length"
    return fused.why_not(device, dtype, head_dim)


class Step:
    """Reads one token after those in a cache, as long as the storage that was captured has room.

    Attributes:
        captured: whether it replays CUDA graphs.
    """

    def __init__(
        self,
        attachment: Attachment,
        cache: ShardCache,
        group: Group,
        device: torch.device,
        forward: Callable[[Tensor, Tensor], Tensor],
        capture: bool,
    ) -> None:
        """Get ready to step.

        Args:
            attachment: the model.
            cache: a shard that has been filled by a prefill.
            group: the ranks that hold the shards; every one of them captures.
            device: a GPU.
            forward: (ids (1, 1), positions (1, 1)) -> logits (vocab,) fp32, by a pass of the model.
            capture: replay CUDA graphs: hundreds of kernels launched as one, with the same numbers out.
        """
        from .kernels import decode  # Triton: there where GPUs are

        self.captured = capture
        self._cache = cache
        self._group = group
        # What changes from step to step lies in the GPU's memory, at addresses that the graph knows. The functions
        # below hold these, not this object: a cycle would keep the cache alive after its session.
        self._ids = ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._slot = slot = torch.zeros(1, dtype=torch.long, device=device)
        self._length = length = torch.zeros(1, dtype=torch.int32, device=device)

        def run(group: Group) -> Tensor:
            def attend(layer: Layer) -> Tensor:
                alone = group.size == 1
                out, lse = decode.attention(layer.q, layer.k, layer.v, layer.scale, length=length, partial=not alone)
                if alone:
                    return out
                return merge_over_ranks(layer, out, lse, group).wait()

            cache.slot = slot
            try:
                with torch.no_grad(), attachment.running(attend, cache.total):
                    return forward(ids, position)
            finally:
                cache.slot = None

        self._run: Callable[[], Tensor] = partial(run, group)
        if capture:
            self._place(0)
            self._run = captured(run, group, device)

    def step(self, token: int) -> Tensor:
        """Read a token; logits (vocab,) fp32 of the next one, rank 0's on all ranks."""
        self._place(token)
        logits = self._group.broadcast(self._run())
        self._cache.total += 1
        if self._cache.keeps_new:
            self._cache.advance()
        return logits

    def _place(self, token: int) -> None:
        """Write down what the next step depends on; fills are queued, nothing waits."""
        self._ids.fill_(token)
        self._position.fill_(self._cache.total)
        self._slot.fill_(self._cache.held)
        self._length.fill_(self._cache.held + self._cache.keeps_new)


class _Recording:
    """What a step does, in turn: graphs, and between them messages. All graphs share memory: their order is fixed."""

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


@dataclass(frozen=True, kw_only=True)
class _Recorded(Group):
    """The ranks of ``real`` while a step is captured: what they gather is noted down."""

    real: Group
    recording: _Recording

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`; ``x`` and the result stay where they are."""
        message, result = x.contiguous(), x.new_empty((self.size, *x.shape)) if into is None else into
        real = self.real  # not this object: the recording it knows would know it, and its memory be freed late
        self.recording.between(lambda: real.all_gather(message, result).wait())
        return Pending(result)


def captured(run: Callable[[Group], Tensor], group: Group, device: torch.device) -> Callable[[], Tensor]:
    """What replays ``run`` by graphs, and gathers between them. It is run before, and must bear being run again."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):  # each writes the same slot, which the first real step overwrites
            run(group)
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
