"""Prefill: one pass of the model over a rank's rows for every round of the plan, with a strategy's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..distributed.collectives import Group
from ..errors import Cancelled
from ..hardware import Stopwatch
from ..hf.attach import Attachment
from ..hf.cache import ShardCache
from ..hf.rows import other_rows
from ..hf.shard_layer import Arrival
from ..layers.base import AttentionInput, as_wide
from ..layers.recurrent import Recur, RecurrentLayers, State
from ..layers.routing import Attend
from ..planning.itinerary import Itinerary
from ..prompt import Prompt
from ..strategies import Strategy
from ..strategies.propagation import Propagating

# Called with (tokens read, tokens of the prompt) while a prompt is read; each layer of a round counts in proportion.
Progress = Callable[[int, int], None]
# Called with the strategy and a layer's q, k, v after its attention, which it may look at and not change.
Look = Callable[[Strategy, AttentionInput], None]


def read(
    attachment: Attachment,
    prompt: Prompt,
    strategy: Strategy,
    everyone: Group,
    *,
    room: int,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    between: Callable[[], None] | None = None,
    look: Look | None = None,
    length: int | None = None,
) -> tuple[ShardCache, Tensor, float]:
    """Read a prompt by a strategy's plan; every rank calls it.

    Args:
        attachment: the model.
        prompt: the prompt to read.
        strategy: this rank's strategy, of the plan; ready for its first round.
        everyone: all processes at work on the prompt, including those that share weights.
        room: tokens to have storage for after the prompt; more may follow, at the cost of a copy.
        progress, cancelled, between, look: as in :meth:`apb.Engine.prefill`; with propagation ``between`` is not
            called.
        length: the length for RoPE variants that depend on it; by default the prompt's.

    Returns:
        cache: this rank's shard.
        logits: (vocab,) fp32, for the token after the last one; the same on all ranks.
        seconds: time that this rank took.
    """
    plan, group = strategy.plan, strategy.group
    device, layers = attachment.devices[0], len(attachment.modules)
    itineraries = [plan.itinerary(group.rank, round) for round in range(plan.rounds)]
    owns_tail = itineraries[0].owns_tail
    tail = plan.query + room if owns_tail else 0
    held = sum(len(block) for block in plan.owned(group.rank))
    cache = ShardCache(
        attachment.layers,
        capacity=held + tail,
        keeps_new=owns_tail,
        total=plan.total,
        windows=attachment.windows,
        expands=attachment.expands,
    )
    read = [sum(len(block) for block in plan.all_blocks() if block.round < round) for round in range(plan.rounds)]
    attended = 0
    propagating = Propagating(strategy, everyone) if plan.going_on < plan.document else None
    before_query: dict[int, State] = {}

    def attend(layer: AttentionInput) -> Tensor:
        nonlocal attended
        if cancelled is not None and everyone.size == 1 and cancelled():
            raise Cancelled("Reading the prompt was cancelled.")
        if between is not None and propagating is None:  # its hooks would change the rows of other passes
            between()
        before = sum(map(len, itinerary.earlier))
        if before and (propagating is None or layer.index <= propagating.layer):
            keys, values = cache.shard(layer.kept)
            layer = replace(layer, earlier=(keys[:before], as_wide(values[:before], keys)))
        if propagating is None:
            out = strategy.attend(layer)
        else:
            out = propagating.attend(layer)
            cache.capacity = tail + propagating.held
        if look is not None:
            look(strategy, layer)
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
        cache.arrival = partial(_arrival, itinerary, propagating)
        attended = 0
        ids, positions = _rows(itinerary, prompt, device)
        recurrent = RecurrentLayers(itinerary, group, device)
        recur = partial(recurrent.read, states=cache.states, before=before_query)
        above = _above(attachment, propagating)
        with torch.no_grad(), _running(attachment, strategy, attend, recur, length), above:
            logits = group.broadcast(attachment.last_logits(ids, positions, cache))
    cache.mark(plan.query_start, before_query)
    return cache, logits, watch.seconds()


def inspect(
    attachment: Attachment,
    prompt: Prompt,
    strategy: Strategy,
    positions: Sequence[int],
    look: Look,
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
    recurrent = RecurrentLayers(itinerary, strategy.group, attachment.devices[0])
    recur = partial(recurrent.read, states={}, before={})
    with torch.no_grad(), _running(attachment, strategy, attend, recur):
        return attachment.logits(ids, places, itinerary.rows_of(positions))


def _arrival(itinerary: Itinerary, propagating: Propagating | None, layer: int) -> Arrival:
    """What a layer of this rank's cache keeps of a round."""
    if propagating is None or layer <= propagating.layer:
        return Arrival(itinerary.kept, itinerary.kept_positions)
    return Arrival(propagating.kept, propagating.kept_positions)


def _running(
    attachment: Attachment, strategy: Strategy, attend: Attend, recur: Recur, length: int | None = None
) -> AbstractContextManager[None]:
    """A pass of the model by a strategy; q, k, v before RoPE are provided only if pairs are to be selected."""
    plan = strategy.plan
    before_rope = strategy.compressor.needs_before_rope and plan.blocks > 1
    return attachment.running(attend, recur, length or plan.total, before_rope)


def _above(attachment: Attachment, propagating: Propagating | None) -> AbstractContextManager[None]:
    """A pass whose layers above that of propagation run over the rows that go on."""
    if propagating is None:
        return nullcontext()
    propagating.begin()
    return other_rows(attachment.model, attachment.modules, propagating.layer + 1, propagating.move)


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
