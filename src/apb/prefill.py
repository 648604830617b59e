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
from .plan import Kind, Plan
from .prompt import Prompt
from .session import Stopwatch, forward
from .strategies import Layer, Strategy

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
    cache = _cache(plan, strategy, layers, max_new_tokens)
    read = [sum(len(block) for block in plan.all_blocks() if block.round < round) for round in range(plan.rounds)]
    before = 0  # tokens in this rank's cache when the round began

    def attend(layer: Layer) -> Tensor:
        if cancelled is not None and everyone.size == 1 and cancelled():
            raise Cancelled("Reading the prompt was cancelled.")
        if before:
            keys, values = cache.shard(layer.index)
            layer = replace(layer, earlier=(keys[:before], values[:before]))
        out = strategy.attend(layer)
        if progress is not None:
            now = read[strategy.round]
            after = plan.total if strategy.last_round else read[strategy.round + 1]
            progress(now + (after - now) * (layer.index + 1) // layers, plan.total)
        return out

    if attachment.finite is not None:
        attachment.finite.clear()
    group.barrier()
    watch = Stopwatch(device)
    for round in range(plan.rounds):
        _check_cancelled(cancelled, everyone, device)
        strategy.begin(round)
        cache.prefill_rows = strategy.cached_rows
        ids, positions = _rows(prompt, plan, group.rank, round)
        with torch.no_grad(), _running(attachment, strategy, attend):
            logits = forward(attachment, ids.to(device), positions.to(device), cache, group)
        before += sum(len(span) for span in strategy.blocks)
    cache.prefill_rows = None
    return cache, logits, watch.seconds()


def inspect(
    attachment: Attachment,
    prompt: Prompt,
    strategy: Strategy,
    positions: Sequence[int],
    look: Callable[[Strategy, Layer], None],
) -> Tensor:
    """Read a prompt on one rank, in one round, keeping no cache, with ``look`` called after each layer's attention.

    Returns logits (positions, vocab) fp32 of the tokens after those at ``positions`` of the prompt.
    """
    plan, device = strategy.plan, attachment.devices[0]
    rows = [
        position - span.start + span.row
        for position in positions
        for span in strategy.spans
        if span.kind is not Kind.ANCHOR and span.start <= position < span.stop
    ]

    def attend(layer: Layer) -> Tensor:
        out = strategy.attend(layer)
        look(strategy, layer)
        return out

    ids, places = _rows(prompt, plan, 0, 0)
    with torch.no_grad(), _running(attachment, strategy, attend):
        output = attachment.model(
            input_ids=ids.to(device),
            position_ids=places.to(device),
            use_cache=False,
            logits_to_keep=rows,  # no tensor: the last layer may lie on another device than the first
        )
    return output.logits[0].float()


def _cache(plan: Plan, strategy: Strategy, layers: int, max_new_tokens: int) -> ShardCache:
    """An empty cache with room for this rank's blocks and, on the tail rank, for query and answer."""
    rank = strategy.group.rank
    keeps_new = rank == plan.tail_rank
    held = sum(len(block) for block in plan.owned(rank))
    cache = ShardCache(
        layers,
        capacity=held + (plan.query + max_new_tokens if keeps_new else 0),
        keeps_new=keeps_new,
        prefill_rows=strategy.cached_rows,
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


def _rows(prompt: Prompt, plan: Plan, rank: int, round: int) -> tuple[Tensor, Tensor]:
    """Token ids and positions, (1, rows) each, of a rank's rows in a round."""
    whole = prompt.token_ids
    anchor = plan.anchor_tokens(prompt.prefix, prompt.document, prompt.query)
    ids: list[int] = []
    positions: list[int] = []
    for span in plan.spans(rank, round):
        ids += (anchor if span.kind is Kind.ANCHOR else whole)[span.start : span.stop]
        positions += range(span.start, span.stop)
    return torch.tensor([ids]), torch.tensor([positions])
