"""Prefill: one pass of the model over a rank's rows for every round of the plan, with a strategy's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..distributed.collectives import Group
from ..errors import Cancelled
from ..hardware import Stopwatch
from ..hf.attach import Attachment
from ..hf.cache import Arrival, ShardCache
from ..layers.base import AttentionInput
from ..layers.recurrent import Recur, RecurrentLayers, State
from ..layers.routing import Attend
from ..planning.itinerary import Itinerary
from ..prompt import Prompt
from ..strategies import Strategy

# Called with (tokens read, tokens of the prompt) while a prompt is read; each layer of a round counts in proportion.
Progress = Callable[[int, int], None]


def read(
    attachment: Attachment,
    prompt: Prompt,
    strategy: Strategy,
    everyone: Group,
    *,
    max_new_tokens: int,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    length: int | None = None,
) -> tuple[ShardCache, Tensor, float]:
    """Read a prompt by a strategy's plan; every rank calls it.

    Args:
        attachment: the model.
        prompt: the prompt to read.
        strategy: this rank's strategy, of the plan; ready for its first round.
        everyone: all processes at work on the prompt, including those that share weights.
        max_new_tokens, progress, cancelled: as in :meth:`apb.Engine.prefill`.
        length: the length for RoPE variants that depend on it; by default the prompt's.

    Returns:
        cache: this rank's shard.
        logits: (vocab,) fp32, for the token after the last one; the same on all ranks.
        seconds: time that this rank took.
    """
    plan, group = strategy.plan, strategy.group
    device, layers = attachment.devices[0], len(attachment.modules)
    itineraries = [plan.itinerary(group.rank, round) for round in range(plan.rounds)]
    cache = _cache(itineraries[0], attachment.layers, max_new_tokens)
    read = [sum(len(block) for block in plan.all_blocks() if block.round < round) for round in range(plan.rounds)]
    attended = 0
    before_query: dict[int, State] = {}

    def attend(layer: AttentionInput) -> Tensor:
        nonlocal attended
        if cancelled is not None and everyone.size == 1 and cancelled():
            raise Cancelled("Reading the prompt was cancelled.")
        before = sum(map(len, itinerary.earlier))
        if before:
            keys, values = cache.shard(layer.index)
            layer = replace(layer, earlier=(keys[:before], values[:before]))
        out = strategy.attend(layer)
        attended += 1
        if progress is not None:
            now = read[itinerary.round]
            after = plan.total if itinerary.last else read[itinerary.round + 1]
            progress(now + (after - now) * attended // layers, plan.total)
        return out

    attachment.forget_not_finite()
    group.barrier()
    watch = Stopwatch(device)
    for itinerary in itineraries:
        _check_cancelled(cancelled, everyone, device)
        strategy.begin(itinerary)
        arrival = Arrival(itinerary.kept, itinerary.kept_positions)
        cache.arrival = lambda layer, arrival=arrival: arrival  # type: ignore[misc]
        attended = 0
        ids, positions = _rows(itinerary, prompt, device)
        recurrent = RecurrentLayers(itinerary)
        recur = partial(recurrent.read, states=cache.states, before=before_query)
        with torch.no_grad(), _running(attachment, strategy, attend, recur, length):
            logits = group.broadcast(attachment.last_logits(ids, positions, cache))
    cache.mark(plan.query_start, before_query)
    return cache, logits, watch.seconds()


def inspect(
    attachment: Attachment,
    prompt: Prompt,
    strategy: Strategy,
    positions: Sequence[int],
    look: Callable[[Strategy, AttentionInput], None],
) -> Tensor:
    """Read a prompt on one rank, in one round, keeping no cache, with ``look`` called after each layer's attention.

    Returns logits (positions, vocab) fp32 of the tokens after those at ``positions`` of the prompt.
    """
    itinerary = strategy.itinerary

    def attend(layer: AttentionInput) -> Tensor:
        out = strategy.attend(layer)
        look(strategy, layer)
        return out

    ids, places = _rows(itinerary, prompt, attachment.devices[0])
    recur = partial(RecurrentLayers(itinerary).read, states={}, before={})
    with torch.no_grad(), _running(attachment, strategy, attend, recur):
        return attachment.logits(ids, places, itinerary.rows_of(positions))


def _cache(itinerary: Itinerary, layers: int, max_new_tokens: int) -> ShardCache:
    """An empty cache with room for this rank's blocks and, on the tail rank, for query and answer."""
    plan = itinerary.plan
    held = sum(len(block) for block in plan.owned(itinerary.rank))
    room = plan.query + max_new_tokens if itinerary.owns_tail else 0
    return ShardCache(layers, capacity=held + room, keeps_new=itinerary.owns_tail, total=plan.total)


def _running(
    attachment: Attachment, strategy: Strategy, attend: Attend, recur: Recur, length: int | None = None
) -> AbstractContextManager[None]:
    """A pass of the model by a strategy; q, k, v before RoPE are provided only if pairs are to be selected."""
    plan = strategy.plan
    before_rope = strategy.compressor.needs_before_rope and plan.blocks > 1
    return attachment.running(attend, recur, length or plan.total, before_rope)


def _check_cancelled(cancelled: Callable[[], bool] | None, everyone: Group, device: torch.device) -> None:
    """Raise Cancelled on all ranks if rank 0's function returns True; either every rank gives a function or none."""
    if cancelled is None:
        return
    word = torch.tensor([everyone.rank == 0 and cancelled()], device=device)
    if everyone.broadcast(word).item():
        raise Cancelled("Reading the prompt was cancelled.")


def _rows(itinerary: Itinerary, prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and positions, (1, rows) each, of an itinerary's rows."""
    ids, positions = itinerary.token_ids(prompt), itinerary.positions()
    return torch.tensor([ids], device=device), torch.tensor([positions], device=device)
