"""Decode steps on a GPU, one token each: all they depend on lies in the GPU's memory, the addresses of keys and values
too, so that CUDA graphs that were captured once serve every step of every session.

On several ranks a step is a graph for every stretch between two messages, which are sent in the ordinary way: there a
lost rank is noticed, and torch.distributed can be taken down while graphs are alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .distributed.collectives import Group, Pending
from .hf.attach import Attachment
from .hf.cache import Layout, ShardCache, StepCache
from .kernels import fused
from .strategies.base import Layer, merge_over_ranks

# Steps run before a capture: the first ones compile kernels.
_WARM_UP = 2
# RoPE variants that look at the largest position on the host, which a graph cannot do.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def why_not(attachment: Attachment, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why steps run as ordinary passes; None where they can be a :class:`Stepper`'s."""
    if device.type != "cuda":
        return f"device type {device.type} has no graphs"
    if len(attachment.devices) > 1:
        return f"layers lie on {len(attachment.devices)} devices"
    if attachment.peculiar:
        return f"layers have {', '.join(sorted(attachment.peculiar))}"
    parameters = getattr(attachment.model.config.get_text_config(), "rope_parameters", None) or {}
    # Some families have one set of parameters a kind of layer.
    sets = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    changing = sorted({str(part.get("rope_type")) for part in sets} & set(_LENGTH_DEPENDENT))
    if changing:
        return f"RoPE of type {' and '.join(changing)} depends on the length"
    return fused.why_not(device, dtype, head_dim)


# (ids (1, 1), positions (1, 1), the cache) -> logits (vocab,) fp32, by a pass of the model.
Forward = Callable[[Tensor, Tensor, Cache], Tensor]


class Stepper:
    """Reads single tokens after what caches hold: for all sessions of an engine, in any order.

    What a graph replays is the model as it was when the graph was captured; who changes it makes a new engine.
    """

    def __init__(self, attachment: Attachment, forward: Forward, graphs: bool) -> None:
        """Get ready to step.

        Args:
            attachment: the model.
            forward: a pass of it.
            graphs: capture CUDA graphs: hundreds of kernels launched as one, with the same numbers out.
        """
        self._attachment = attachment
        self._forward = forward
        self._graphs = graphs
        self._steps: dict[tuple[Layout, Group], _Step] = {}

    def why_not(self, cache: ShardCache) -> str | None:
        """Why a token after those in a cache is read by an ordinary pass; None where it can be by :meth:`step`."""
        layout = cache.layout
        if None in layout.heads:
            return "some layers keep no keys and values"
        head_dim = max(heads[1] for heads in layout.heads if heads is not None)
        return why_not(self._attachment, layout.device, layout.dtype, head_dim)

    def step(self, cache: ShardCache, token: int, group: Group, capture: bool = True) -> Tensor:
        """Read a token after those in a cache; logits (vocab,) fp32 of the next one, rank 0's on all ranks.

        Args:
            cache: a shard that has been filled by a prefill; it grows where it is full.
            token: what to read.
            group: the ranks that hold the shards; all of them call this.
            capture: capture graphs if there are none for such a cache.
        """
        key = cache.layout, group
        if key not in self._steps:
            self._steps[key] = _Step(self._attachment, self._forward, cache.layout, group)
        return self._steps[key].read(cache, token, capture and self._graphs)

    def captured(self, cache: ShardCache, group: Group) -> bool:
        """Whether there are graphs by which tokens after those in such a cache are read."""
        step = self._steps.get((cache.layout, group))
        return step is not None and step.captured

    def close(self) -> None:
        """Let go of all graphs; there will be no others."""
        self._graphs = False
        self._steps.clear()


class _Step:
    """What reads one token after those in any cache of one layout.

    Attributes:
        captured: whether it replays CUDA graphs.
    """

    def __init__(self, attachment: Attachment, forward: Forward, layout: Layout, group: Group) -> None:
        from .kernels import decode  # Triton: there where GPUs are

        self._group = group
        # What changes from step to step lies in the GPU's memory, at addresses that a graph knows: the token, its
        # position, its slot in the cache, how many keys it sees, and where these lie.
        device = layout.device
        self._ids = ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._slot = slot = torch.zeros(1, dtype=torch.long, device=device)
        self._length = length = torch.zeros(1, dtype=torch.int32, device=device)
        self._table = table = torch.zeros(len(layout.heads), 3, dtype=torch.long, device=device)
        self._placed: list[tuple[int, int, int]] = []  # what the table says

        def append(layer: int, k: Tensor, v: Tensor) -> None:
            assert k.dtype == v.dtype == layout.dtype and (k.shape[1], k.shape[3]) == layout.heads[layer]
            if layout.keeps_new:
                decode.append(k[0, :, 0], v[0, :, 0], table, layer, slot)

        # The functions here hold these, and not this object: a cycle would keep graphs alive after their engine.
        self._cache = cache = StepCache(len(layout.heads), append)

        def run(group: Group) -> Tensor:
            def attend(layer: Layer) -> Tensor:
                alone, kv_heads = group.size == 1, layer.k.shape[1]
                out, lse = decode.cached_attention(
                    layer.q, table, layer.index, kv_heads, layer.scale, length, partial=not alone
                )
                return out if alone else merge_over_ranks(layer, out, lse, group).wait()

            with torch.no_grad(), attachment.running(attend, cache.total):
                return forward(ids, position, cache)

        self._run: Callable[[Group], Tensor] = run
        self._replay: Callable[[], Tensor] | None = None

    @property
    def captured(self) -> bool:
        """Whether it replays CUDA graphs."""
        return self._replay is not None

    def read(self, cache: ShardCache, token: int, capture: bool) -> Tensor:
        """See :meth:`Stepper.step`."""
        self._place(cache, token)
        if capture and self._replay is None and not self._cache.asked:
            replay = captured(self._run, self._group, self._table.device)
            self._replay = None if self._cache.asked else replay
        logits = self._run(self._group) if self._replay is None else self._replay()
        cache.advance()
        return self._group.broadcast(logits)

    def _place(self, cache: ShardCache, token: int) -> None:
        """Write down what the next step depends on; fills are queued, nothing waits."""
        cache.make_room()
        addresses = cache.addresses()
        if addresses != self._placed:  # another cache than at the last step, or it has grown
            assert all(address % 16 == 0 for *pair, _ in addresses for address in pair)
            self._table.copy_(torch.tensor(addresses))
            self._placed = addresses
        self._cache.total = cache.total
        self._ids.fill_(token)
        self._position.fill_(cache.total)
        self._slot.fill_(cache.held)
        self._length.fill_(cache.held + cache.keeps_new)


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


@dataclass(frozen=True)
class _Silent(Group):
    """As many ranks, of which each believes that all others have what it has: nothing is sent."""

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Pending:
        """See :meth:`Group.all_gather`."""
        return Pending(torch.stack([x] * self.size, out=into))


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
    """What replays ``run`` by graphs, and gathers between them. It is run before, and must bear being run again.

    Nothing is sent meanwhile: other ranks may have captured theirs already.
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
