"""Decode steps on a GPU: one token each, by kernels that read everything they depend on from the GPU's memory.

The addresses of keys and values are read from there too, so CUDA graphs that were captured once serve every step of
every session of an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from ..decoding import Decoding, Reader, StoredReader
from ..distributed.collectives import Group
from ..distributed.one_shot import quick
from ..hf.attach import Attachment
from ..hf.cache import Layout, ShardCache
from ..hf.stepping import StepCache
from ..kernels import fused
from ..layers.base import AttentionInput
from ..layers.recurrent import RecurrentInput
from ..layers.shards import StoredShard, merge_over_ranks
from .capture import captured


class Stepper:
    """Decode steps over the caches of all sessions of an engine, in any order.

    A graph replays the model as it was at capture; after a change of the model make a new engine.
    """

    def __init__(self, attachment: Attachment, decoding: Decoding, group: Group, graphs: bool) -> None:
        """Make a stepper; graphs are captured later, by :meth:`step`.

        Args:
            attachment: the model.
            decoding: attends to the cache.
            group: the ranks that hold the shards.
            graphs: capture CUDA graphs: hundreds of kernels launched as one, with the same results.
        """
        self._attachment = attachment
        self._decoding = decoding
        self._steppable = decoding.stored_reader() is not None
        self._group = group
        self._graphs = graphs
        self._steps: dict[Layout, _Step] = {}

    def why_not(self, cache: ShardCache) -> str | None:
        """The reason why a token over a cache needs an ordinary pass; None if :meth:`step` can read it."""
        layout, attachment = cache.layout, self._attachment
        if not self._steppable:
            return f"the decode method {self._decoding.name!r} has no kernels for captured steps"
        if attachment.recurrent:
            return "recurrent layers carry a state from token to token"
        if attachment.expands:
            return "keys and values are expanded from what the cache holds"
        if None in layout.heads:
            return "some layers keep no keys and values"
        if layout.device.type != "cuda":
            return f"device type {layout.device.type} has no graphs"
        if len(attachment.devices) > 1:
            return f"layers lie on {len(attachment.devices)} devices"
        if attachment.left_shared is not None:
            return attachment.left_shared
        if attachment.peculiar:
            return f"layers have {', '.join(sorted(attachment.peculiar))}"
        if attachment.length_dependent:
            return f"RoPE of type {' and '.join(attachment.length_dependent)} depends on the length"
        if cache.offloaded:
            return "keys and values are in host memory"
        head_dim = max(heads[1] for heads in layout.heads if heads is not None)
        return fused.why_not(layout.device, layout.dtype, head_dim)

    def step(self, cache: ShardCache, reader: Reader, token: int, capture: bool = True) -> Tensor:
        """Read a token; logits (vocab,) fp32 of the next one, rank 0's on all ranks. All ranks call this.

        Args:
            cache: a shard that has been filled by a prefill; it grows when full.
            reader: the decode method's, of this shard.
            token: its id.
            capture: capture graphs if there are none for such a cache.
        """
        if cache.layout not in self._steps:
            stored = self._decoding.stored_reader()
            assert stored is not None, "why_not was asked"
            self._steps[cache.layout] = _Step(self._attachment, stored, cache.layout, self._group)
        return self._steps[cache.layout].read(cache, reader, token, capture and self._graphs)

    def captured(self, cache: ShardCache) -> bool:
        """True if there are graphs by which tokens over such a cache are read."""
        step = self._steps.get(cache.layout)
        return step is not None and step.captured

    def close(self) -> None:
        """Free all graphs and capture no others."""
        self._graphs = False
        self._steps.clear()


def _none(layer: RecurrentInput) -> Tensor:
    raise AssertionError("models with recurrent layers are not stepped")


class _Step:
    """Reads one token over any cache of one layout."""

    def __init__(self, attachment: Attachment, stored: StoredReader, layout: Layout, group: Group) -> None:
        from ..kernels import decode  # Triton: there where GPUs are

        self._group = group = quick(group, layout.device)[0]
        self._stored = stored
        # Everything that changes from step to step is in the GPU's memory, at fixed addresses: the token, its position,
        # and for every layer its slot in the cache, the number of keys it sees, and their addresses.
        device = layout.device
        self._ids = ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._slots = slots = torch.zeros(len(layout.heads), dtype=torch.long, device=device)
        self._lengths = lengths = torch.zeros(len(layout.heads), dtype=torch.int32, device=device)
        self._table = table = torch.zeros(len(layout.heads), 3, dtype=torch.long, device=device)
        self._placed: list[tuple[int, int, int]] = []  # the addresses in the table

        def append(layer: int, k: Tensor, v: Tensor) -> None:
            assert k.dtype == v.dtype == layout.dtype and (k.shape[1], k.shape[3]) == layout.heads[layer]
            if layout.keeps_new:
                decode.append(k[0, :, 0], v[0, :, 0], table, layer, slots[layer : layer + 1])

        # The functions below capture these instead of self: a cycle would keep graphs alive after their engine.
        self._cache = cache = StepCache(len(layout.heads), append)
        shards = [StoredShard(table, length, group.size > 1) for length in lengths.split(1)]

        def run(group: Group) -> Tensor:
            def attend(layer: AttentionInput) -> Tensor:
                return merge_over_ranks(layer, *stored.attend(layer, shards[layer.index]), group).wait()

            with torch.no_grad(), attachment.running(attend, _none, cache.total):
                return attachment.last_logits(ids, position, cache)

        self._run: Callable[[Group], Tensor] = run
        self._replay: Callable[[], Tensor] | None = None

    @property
    def captured(self) -> bool:
        """True if it replays CUDA graphs."""
        return self._replay is not None

    def read(self, cache: ShardCache, reader: Reader, token: int, capture: bool) -> Tensor:
        """See :meth:`Stepper.step`."""
        self._place(cache, token)
        self._stored.begin(reader, [held + cache.keeps_new for held in cache.held])
        if capture and self._replay is None and not self._cache.asked:
            replay = captured(self._run, self._group, self._table.device)
            self._replay = None if self._cache.asked else replay
        logits = self._run(self._group) if self._replay is None else self._replay()
        self._stored.end(reader)
        cache.advance()
        return self._group.broadcast(logits)

    def _place(self, cache: ShardCache, token: int) -> None:
        """Write the inputs of the next step to the GPU; fills are queued, nothing waits."""
        cache.make_room()
        addresses = cache.addresses()
        if addresses != self._placed:  # another cache than at the last step, or it has grown
            assert all(address % 16 == 0 for *pair, _ in addresses for address in pair)
            self._table.copy_(torch.tensor(addresses))
            self._placed = addresses
        self._cache.total = cache.total
        self._ids.fill_(token)
        self._position.fill_(cache.total)
        first = 0
        for held, layers in groupby(cache.held):  # one number, or two where fewer tokens went through the upper layers
            stop = first + sum(1 for _ in layers)
            self._slots[first:stop].fill_(held)
            self._lengths[first:stop].fill_(held + cache.keeps_new)
            first = stop
