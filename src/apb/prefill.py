"""Reading a prompt: a pass of the model over a rank's rows for every round of the plan, attended by a strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from .distributed.collectives import Group
from .errors import Cancelled
from .hf.attach import Attachment, Attend
from .hf.cache import ShardCache
from .layers.base import AttentionInput
from .planning.itinerary import Itinerary
from .prompt import Prompt
from .session import Stopwatch, forward
from .strategies import Strategy

# Called with (tokens read, tokens of the prompt) while a prompt is read; between them layers count in proportion.
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
) -> tuple[ShardCache, Tensor, float]:
    """Read a prompt by a strategy's plan; every rank calls it.

    Args:
        attachment: the model.
        prompt: what to read.
        strategy: this rank's, of the plan; ready for its first round.
        everyone: all processes at work on the prompt, those that share weights included.
        max_new_tokens, progress, cancelled: as in :meth:`apb.Engine.prefill`.

    Returns:
        cache: this rank's shard.
        logits: (vocab,) fp32, for the token after the last one; the same on all ranks.
        seconds: what this rank took.
    """
    plan, group = strategy.plan, strategy.group
    device, layers = attachment.devices[0], len(attachment.modules)
    itineraries = [plan.itinerary(group.rank, round) for round in range(plan.rounds)]
    cache = _cache(itineraries[0], layers, max_new_tokens)
    read = [sum(len(block) for block in plan.all_blocks() if block.round < round) for round in range(plan.rounds)]
    before = 0  # tokens in this rank's cache when the round began

    def attend(layer: AttentionInput) -> Tensor:
        if cancelled is not None and everyone.size == 1 and cancelled():
            raise Cancelled("Reading the prompt was cancelled.")
        if before:
            keys, values = cache.shard(layer.index)
            layer = replace(layer, earlier=(keys[:before], values[:before]))
        out = strategy.attend(layer)
        if progress is not None:
            now = read[itinerary.round]
            after = plan.total if itinerary.last else read[itinerary.round + 1]
            progress(now + (after - now) * (layer.index + 1) // layers, plan.total)
        return out

    group.barrier()
    watch = Stopwatch(device)
    for itinerary in itineraries:
        _check_cancelled(cancelled, everyone, device)
        strategy.begin(itinerary)
        cache.prefill_rows = itinerary.kept
        ids, positions = _rows(itinerary, prompt, device)
        with torch.no_grad(), _running(attachment, strategy, attend):
            logits = forward(attachment, ids, positions, cache, group)
        before += sum(map(len, itinerary.blocks))
    cache.prefill_rows = None
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
    itinerary, device = strategy.itinerary, attachment.devices[0]

    def attend(layer: AttentionInput) -> Tensor:
        out = strategy.attend(layer)
        look(strategy, layer)
        return out

    ids, places = _rows(itinerary, prompt, device)
    with torch.no_grad(), _running(attachment, strategy, attend):
        output = attachment.model(
            input_ids=ids,
            position_ids=places,
            use_cache=False,
            logits_to_keep=itinerary.rows_of(
                positions
            ),  # no tensor: the last layer may lie on another device than the first
        )
    return output.logits[0].float()


def _cache(itinerary: Itinerary, layers: int, max_new_tokens: int) -> ShardCache:
    """An empty cache with room for this rank's blocks and, on the tail rank, for query and answer."""
    plan = itinerary.plan
    held = sum(len(block) for block in plan.owned(itinerary.rank))
    cache = ShardCache(
        layers,
        capacity=held + (plan.query + max_new_tokens if itinerary.owns_tail else 0),
        keeps_new=itinerary.owns_tail,
        prefill_rows=itinerary.kept,
    )
    cache.total = plan.total
    return cache


def _running(attachment: Attachment, strategy: Strategy, attend: Attend) -> AbstractContextManager[None]:
    """A pass of the model by a strategy; q, k, v before RoPE are only there where something is to be selected."""
    plan = strategy.plan
    return attachment.running(attend, plan.total, strategy.compressor.needs_before_rope and plan.blocks > 1)


def _check_cancelled(cancelled: Callable[[], bool] | None, everyone: Group, device: torch.device) -> None:
    """Raise Cancelled on all ranks where rank 0 says so. Every rank gives a function, or none does."""
    if cancelled is None:
        return
    word = torch.tensor([everyone.rank == 0 and cancelled()], device=device)
    if everyone.broadcast(word).item():
        raise Cancelled("Reading the prompt was cancelled.")


def _rows(itinerary: Itinerary, prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and positions, (1, rows) each, of an itinerary's rows."""
    ids, positions = itinerary.token_ids(prompt), itinerary.positions()
    return torch.tensor([ids], device=device), torch.tensor([positions], device=device)
