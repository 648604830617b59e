"""Decode steps on a GPU: a token of one session, or of each of several, by kernels that read everything they depend on
from the GPU's memory.

The addresses of keys and values are read from there too, so CUDA graphs that were captured once serve every step of
every session of an engine, and of other engines on its model that decode alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from ..layers.shards import StoredShard, merge_over_ranks
from .alone import refuse_counting
from .capture import captured
from .states import FixedStates


class Stepper:
    """Decode steps over the caches of all sessions of an engine, and of those that share it, in any order.

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
        stored = decoding.stored_reader()
        self._steppable = stored is not None
        self._far = stored is not None and stored.far
        self._batched = stored is not None and stored.batched
        self._group = group
        self._graphs = graphs
        # By the caches' layout, and the number of rows: a power of two.
        self._steps: dict[tuple[Layout, int], _Step] = {}

    def why_not(self, cache: ShardCache) -> str | None:
        """The reason why a token over a cache needs an ordinary pass; None if :meth:`step` can read it."""
        layout, attachment = cache.layout, self._attachment
        if not self._steppable:
            return f"the decode method {self._decoding.name!r} has no kernels for captured steps"
        if attachment.expands:
            return "keys and values are expanded from what the cache holds"
        if any(layout.heads[layer] is None for layer in attachment.attending):
            return "some layers keep no keys and values"
        if sum(bool(state.tensors()) for state in cache.states.values()) != attachment.recurrent:
            return "recurrent layers have read no row"
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
        head_dims = [heads[1] for heads in layout.heads if heads is not None]
        if cache.offloaded and not self._far:
            return "keys and values are in host memory"
        if self._far and any(head_dim * layout.dtype.itemsize % 16 for head_dim in head_dims):
            return "keys and values in host memory are read 16 bytes at a time"
        return fused.why_not(layout.device, layout.dtype, max(head_dims))

    @property
    def batched(self) -> bool:
        """True if :meth:`step` reads tokens of several sessions."""
        return self._batched

    def step(
        self,
        caches: Sequence[ShardCache],
        readers: Sequence[Reader],
        tokens: Sequence[int],
        capture: bool = True,
        rows: int = 1,
    ) -> Tensor:
        """Read one token after what each cache holds. All ranks call this; should it fail, no cache has advanced.

        Args:
            caches: shards of different sessions, of one layout, filled by prefills; they grow when full.
            readers: the decode method's, of each shard.
            tokens: an id for each.
            capture: capture graphs if there are none for so many such caches.
            rows: of the pass at least; those beyond the caches are padding.

        Returns:
            logits (sessions, vocab) fp32 of the next tokens, rank 0's on all ranks.
        """
        key = _key(caches, rows)
        if key not in self._steps:
            stored = self._decoding.stored_reader()
            assert stored is not None, "why_not was asked"
            self._steps[key] = _Step(self._attachment, stored, *key, FixedStates(caches[0].states), self._group)
        step = self._steps[key]
        logits = step.read(caches, readers, tokens, capture and self._graphs)
        if step.asks_total and len(caches) > 1:
            refuse_counting(self._attachment)
        for cache in caches:
            cache.advance()
        return logits

    def captured(self, caches: Sequence[ShardCache], rows: int = 1) -> bool:
        """True if there are graphs by which tokens over such caches are read, in passes of at least so many rows."""
        step = self._steps.get(_key(caches, rows))
        return step is not None and step.captured

    def close(self) -> None:
        """Free all graphs and capture no others."""
        self._graphs = False
        self._steps.clear()


def _key(caches: Sequence[ShardCache], rows: int) -> tuple[Layout, int]:
    """What steps are kept by. Few numbers of rows, as each is captured for itself: those between are padded."""
    return caches[0].layout, 1 << (max(len(caches), rows) - 1).bit_length()


class _Step:
    """Reads one token over each of several caches of one layout: as many as there are rows, or fewer."""

    def __init__(
        self,
        attachment: Attachment,
        stored: StoredReader,
        layout: Layout,
        rows: int,
        states: FixedStates,
        group: Group,
    ) -> None:
        from ..kernels import decode  # Triton: there where GPUs are

        self._group = group = quick(group, layout.device)[0]
        assert rows == 1 or not attachment.recurrent, "recurrent layers read rows in order"
        self._stored = stored
        self._states = states
        # Everything that changes from step to step is in the GPU's memory, at fixed addresses. For every row: its
        # token, the token's position, and for every layer its slot in the cache, the number of keys it sees, and their
        # addresses.
        device, layers = layout.device, len(layout.heads)
        self._inputs = torch.zeros(2 + layers, rows, dtype=torch.long, device=device)
        ids, positions, slots = self._inputs[:1], self._inputs[1:2], self._inputs[2:]
        self._keeps_new = layout.keeps_new
        self._lengths = lengths = torch.zeros(layers, rows, dtype=torch.int32, device=device)
        self._table = table = torch.zeros(layers, rows, 3, dtype=torch.long, device=device)
        self._placed: list[list[tuple[int, int, int]]] = []  # the addresses in the table
        # Rows without a session have a cache of one token, to which they write what nobody reads, all in the same
        # place: no session's memory is touched, and kernels need not know of them.
        widest = max(heads * width for heads, width in filter(None, layout.heads))
        self._unused = [torch.zeros(widest, dtype=layout.dtype, device=device) for _ in "kv"]

        def append(layer: int, k: Tensor, v: Tensor) -> None:
            assert k.dtype == v.dtype == layout.dtype and (k.shape[1], k.shape[3]) == layout.heads[layer]
            if layout.keeps_new:
                decode.append(k[0].transpose(0, 1), v[0].transpose(0, 1), table, layer, slots[layer])

        # The functions below capture these instead of self: a cycle would keep graphs alive after their engine.
        self._cache = cache = StepCache(layers, append)
        shards = [StoredShard(table, length, group.size > 1) for length in lengths]

        def run(group: Group) -> Tensor:
            def attend(layer: AttentionInput) -> Tensor:
                return merge_over_ranks(layer, *stored.attend(layer, shards[layer.index]), group).wait()

            with torch.no_grad(), attachment.running(attend, states.recur, cache.total):
                return attachment.all_logits(ids, positions, cache)

        self._run: Callable[[Group], Tensor] = run
        self._replay: Callable[[], Tensor] | None = None

    @property
    def captured(self) -> bool:
        """True if it replays CUDA graphs."""
        return self._replay is not None

    @property
    def asks_total(self) -> bool:
        """True if the model's code has asked for the number of tokens, which is not the same for all rows."""
        return self._cache.asked

    def read(
        self, caches: Sequence[ShardCache], readers: Sequence[Reader], tokens: Sequence[int], capture: bool
    ) -> Tensor:
        """See :meth:`Stepper.step`; the caches do not advance."""
        held = self._place(caches, tokens)
        for cache, reader, lengths in zip(caches, readers, held, strict=True):
            self._stored.begin(reader, [length + cache.keeps_new for length in lengths])
        if capture and self._replay is None and not self._cache.asked:
            replay = captured(self._run, self._group, self._table.device)
            self._replay = None if self._cache.asked else replay
        states = caches[0].states  # a model that has any reads one row
        self._states.take(states)  # not before, as a capture writes to them
        logits = self._run(self._group) if self._replay is None else self._replay()
        for reader in readers:
            self._stored.end(reader)
        logits = self._group.broadcast(logits)[: len(caches)]
        self._states.give(states)  # last: should anything fail, the session is where it was
        return logits

    def _place(self, caches: Sequence[ShardCache], tokens: Sequence[int]) -> list[list[int]]:
        """Write the inputs of the next step to the GPU; copies are queued, nothing waits.

        Returns what each cache holds of every layer.
        """
        layers, unused = len(self._table), self._table.shape[1] - len(caches)
        for cache in caches:
            cache.make_room()
        addresses = [cache.addresses() for cache in caches]
        if addresses != self._placed:  # other caches than at the last step, or one has grown
            k, v = (x.data_ptr() for x in self._unused)
            places = [*addresses, *[[(k, v, 1)] * layers] * unused]
            assert all(address % 16 == 0 for each in places for *pair, _ in each for address in pair)
            self._table.copy_(torch.tensor(list(zip(*places, strict=True))), non_blocking=True)
            self._placed = addresses
        self._cache.total = max(cache.total for cache in caches)
        held = [cache.held for cache in caches]
        rows = [[token, cache.total, *each] for cache, token, each in zip(caches, tokens, held, strict=True)]
        rows += [[0] * len(self._inputs)] * unused
        self._inputs.copy_(torch.tensor(list(zip(*rows, strict=True))), non_blocking=True)
        torch.add(self._inputs[2:], int(self._keeps_new), out=self._lengths)
        return held
