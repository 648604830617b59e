"""One token after each of several prompts, in one pass of the model.

A decode step reads all weights for a single row. Here the rows of a pass are tokens of several sessions: what works row
by row (linear layers, norms, experts, RoPE by the rows' own positions) reads its weights once for all of them, and in
attention every row has its own cache. On GPUs such a pass is a captured step, where each session's alone would be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..hf.stepping import StepCache
from ..layers.base import AttentionInput, as_wide
from ..layers.recurrent import RecurrentInput
from ..layers.shards import merge_over_ranks
from .alone import refuse_counting
from .step import Stepper
from .tokens import Continuation


def read_together(continuations: Sequence[Continuation], token_ids: Sequence[int], rows: int = 1) -> Tensor:
    """Read one token after each of several prompts, of one model and the same ranks, in one pass.

    Every rank calls it. Should the pass fail, all caches are as they were.

    Args:
        continuations: of different caches; each one's decode method attends to its own.
        token_ids: a token for each.
        rows: of a captured step at least. In steps of always as many rows a row's numbers do not depend on how many of
            them are in use: products of few rows sum in another order than those of many.

    Returns:
        logits (prompts, vocab) fp32 of the next tokens, on all ranks: those of :meth:`Continuation.read`, up to
        rounding, as products of several rows sum in another order than those of one.
    """
    attachment = continuations[0].decoder.attachment
    assert all(each.decoder.attachment is attachment for each in continuations), "sessions of one model"
    caches = [each.cache for each in continuations]
    stepper = _stepper(continuations)
    if stepper is None:
        logits, captured = _read_in_a_pass(continuations, token_ids), False
    else:
        readers = [each.reader for each in continuations]
        logits = stepper.step(caches, readers, token_ids, any(each.capture for each in continuations), rows)
        captured = stepper.captured(caches, rows)
    for each in continuations:
        each.captured = captured
    return logits


def _stepper(continuations: Sequence[Continuation]) -> Stepper | None:
    """What reads a token of each in one captured step; None if one of them, or all together, need an ordinary pass.

    It is the same on all ranks: rows that pad a step are in its messages too.
    """
    first = continuations[0]
    alike = all(
        each.stepped and each.cache.layout == first.cache.layout and each.decoder.decoding == first.decoder.decoding
        for each in continuations
    )
    return first.decoder.stepper if alike and first.decoder.stepper.batched else None


def _read_in_a_pass(continuations: Sequence[Continuation], token_ids: Sequence[int]) -> Tensor:
    """See :func:`read_together`: kernel by kernel, in attention session by session."""
    decoder = continuations[0].decoder
    attachment, group, device = decoder.attachment, decoder.group, decoder.attachment.devices[0]
    caches = [each.cache for each in continuations]
    starts = [cache.total for cache in caches]

    def append(layer: int, k: Tensor, v: Tensor) -> None:
        for row, cache in enumerate(caches):
            cache.update(k[:, :, row : row + 1], v[:, :, row : row + 1], layer)

    def attend(layer: AttentionInput) -> Tensor:
        parts = []
        for row, (each, start) in enumerate(zip(continuations, starts, strict=True)):
            k, v = each.cache.near(layer.kept)
            assert k.shape[1:] == layer.k.shape[1:], "caches hold what is attended to"
            # A window that is longer than one text may be shorter than another.
            window = layer.window if layer.window is not None and layer.window <= start else None
            own = replace(layer, q=layer.q[row : row + 1], k=k, v=as_wide(v, k), window=window)
            parts.append(each.partial(own, start))
        outs, lses = zip(*parts, strict=True)
        return merge_over_ranks(layer, torch.cat(outs), torch.cat(lses, 1), group).wait()

    ids, positions = torch.tensor([list(token_ids)], device=device), torch.tensor([starts], device=device)
    rows = StepCache(attachment.layers, append)
    for cache, start in zip(caches, starts, strict=True):
        cache.expect(range(start, start + 1))
    rows.total = max(starts) + 1
    try:
        with torch.no_grad(), attachment.running(attend, _no_state, rows.total):
            logits = group.broadcast(attachment.all_logits(ids, positions, rows))
        if rows.asked:
            refuse_counting(attachment)
    except BaseException:
        for cache, start in zip(caches, starts, strict=True):
            cache.forget(start)
        raise
    return logits


def _no_state(layer: RecurrentInput) -> Tensor:
    """What a recurrent layer's module calls in passes that no model with such layers makes."""
    raise AssertionError("models with recurrent layers read one session at a time")
