"""A prompt that has been read: its cache, spread over the ranks, and the distribution of the next token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from .distributed.collectives import Group
from .errors import InputError
from .graph import Step, why_not
from .hardware import synchronize
from .hf.attach import Attachment
from .hf.cache import ShardCache
from .plan import Kind, Plan
from .prompt import check_tokens
from .strategies.base import Layer, attend_shards

# Answers of fewer tokens do not repay the capture of a graph.
SHORTEST_CAPTURED = 8


class Session:
    """What :meth:`apb.Engine.prefill` gives. Every rank holds one and makes the same calls on it.

    Attributes:
        logits: (vocab,) fp32, for the token after the last one read; the same on all ranks.
        plan: the plan the prompt was read by.
        timing: ``prefill_s``, seconds this rank took.
        token_ids: the prompt's tokens and those given to :meth:`extend`.
    """

    def __init__(
        self,
        attachment: Attachment,
        plan: Plan,
        group: Group,
        cache: ShardCache,
        logits: Tensor,
        prefill_s: float,
        token_ids: Sequence[int],
        backend: str,
        new_tokens: int,
        graphs: bool,
        tensor: Group | None = None,
        limit: int | None = None,
    ) -> None:
        self.plan = plan
        self.logits = logits
        self.timing = {"prefill_s": prefill_s}
        self.token_ids = list(token_ids)
        self._attachment = attachment
        self._group = group
        self._cache = cache
        self._backend = backend
        self._tensor = tensor or Group()
        self._new_tokens = new_tokens  # that the cache has room for
        self._graphs = graphs
        self._limit = limit  # positions that may be read; None: any number
        self._step: Step | None = None

    def extend(self, token_ids: Sequence[int]) -> Tensor:
        """Read more tokens at the prompt's end, exactly, over all ranks' shards; ``logits`` (vocab,) follow.

        One token is a decode step; several are read in one pass.
        """
        if not token_ids:
            raise InputError("No tokens were given to read; pass at least one token id.")
        check_tokens(token_ids, self._attachment.vocabulary)
        total = len(self.token_ids) + len(token_ids)
        if self._limit is not None and total > self._limit:
            raise InputError(
                f"With {len(token_ids)} more tokens there are {total}, {total - self._limit} more than the model's "
                f"{self._limit} positions; read fewer, or make the engine with allow_extrapolation=True."
            )
        step = self._next_step() if len(token_ids) == 1 else None
        if step is not None:
            self.logits = step.step(token_ids[0])
        else:
            self.logits = self._pass(token_ids)
        self.token_ids.extend(token_ids)
        return self.logits

    def what_is_not_finite(self, everyone: Group) -> str:
        """A sentence about logits that are not numbers; every process calls it, and all get the same.

        It names the layer where that began, if layers were looked at (see :class:`apb.NotFinite`).
        """
        unknown = len(self._cache)
        first = self._attachment.first_not_finite()
        seen = torch.tensor([unknown if first is None else first], device=self.logits.device)
        layer = int(everyone.all_gather(seen).wait().min())
        where = (
            f"the attention of layer {layer} was the first to give such numbers"
            if layer < unknown
            else "APB_CHECK_FINITE=1 in the environment names the layer where that begins"
        )
        told = len(self.token_ids) - self.plan.total
        return (
            f"The model's scores for the next token, {told} tokens into the answer, are NaN or infinite: {where}; "
            "use a wider dtype (--dtype float32), or other weights."
        )

    @property
    def captured(self) -> bool:
        """Whether tokens are read by CUDA graphs, as they are from the first on for which that can be."""
        return self._step is not None and self._step.captured

    def _next_step(self) -> Step | None:
        """What reads the next token, where that is not an ordinary pass. All ranks say the same."""
        if len(self.token_ids) - self.plan.total >= self._new_tokens or self._backend not in ("auto", "fused"):
            return None
        if self._step is None:
            keys, _ = self._cache.shard(0)
            if why_not(self._attachment, keys.device, keys.dtype, keys.shape[2]):
                return None

            run = partial(next_logits, self._attachment, cache=self._cache)
            capture = self._graphs and self._new_tokens >= SHORTEST_CAPTURED
            self._step = Step(self._attachment, self._cache, self._group, keys.device, run, capture)
        return self._step

    def _pass(self, token_ids: Sequence[int]) -> Tensor:
        """Read tokens in one ordinary pass."""
        start, count = self._cache.total, len(token_ids)

        def attend(layer: Layer) -> Tensor:
            layer = replace(layer, k=layer.k[:held], v=layer.v[:held])
            return attend_shards(layer, start, shard, group=self._group, backend=self._backend).wait()

        device = self.logits.device
        ids = torch.tensor([list(token_ids)], device=device)
        positions = torch.arange(start, start + count, device=device).unsqueeze(0)
        self._cache.total = start + count
        shard = self._positions(self._group.rank)
        held = sum(map(len, shard))
        with torch.no_grad(), self._attachment.running(attend, self._cache.total):
            return forward(self._attachment, ids, positions, self._cache, self._group)

    def gather_kv(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The cache of one layer: keys and values (kv_heads, tokens, head_dim), on rank 0; (None, None) elsewhere.

        Tokens in document order: prefix, document, query, then what was read since. Every rank must call it.
        """
        if not 0 <= layer < len(self._cache):
            raise InputError(f"There is no layer {layer}; the model has layers 0 to {len(self._cache) - 1}.")
        keys, values = (self._gather(shard) for shard in self._cache.shard(layer))
        if keys is None or values is None:
            return None, None
        if not self._shares_heads(keys):
            return (keys.transpose(0, 1), values.transpose(0, 1)) if self._tensor.rank == 0 else (None, None)
        parts = [self._tensor.gather(x.contiguous()) for x in (keys, values)]
        if parts[0] is None or parts[1] is None:
            return None, None
        return torch.cat(parts[0], 1).transpose(0, 1), torch.cat(parts[1], 1).transpose(0, 1)

    def _shares_heads(self, keys: Tensor) -> bool:
        """Whether each process of a rank holds other KV heads; some models hold all of them in every process."""
        text = self._attachment.model.config.get_text_config()
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return self._tensor.size > 1 and keys.shape[1] * self._tensor.size == kv_heads

    def _gather(self, shard: Tensor) -> Tensor | None:
        """All ranks' shards (tokens, kv_heads, head_dim) in document order, on rank 0."""
        orders = [self._positions(rank) for rank in range(self.plan.ranks)]
        width = max(sum(map(len, order)) for order in orders)
        padded = shard.new_zeros(width, *shard.shape[1:])
        padded[: shard.shape[0]] = shard
        parts = self._group.gather(padded)
        if parts is None:
            return None
        whole = shard.new_empty(self._cache.total, *shard.shape[1:])
        for order, part in zip(orders, parts, strict=True):
            row = 0
            for positions in order:
                whole[positions.start : positions.stop] = part[row : row + len(positions)]
                row += len(positions)
        return whole

    def cache_bytes(self) -> int:
        """Bytes of keys and values that this rank holds, over all layers."""
        shards = (self._cache.shard(layer) for layer in range(len(self._cache)))
        return sum(part.numel() * part.element_size() for shard in shards for part in shard)

    def to_dynamic_cache(self) -> DynamicCache | None:
        """The whole cache as transformers' own, on rank 0, for ``model.generate`` to go on from; None elsewhere.

        Give the model back first (:meth:`apb.Engine.close`), and pass ``generate`` all tokens so far and at least one
        more. Every rank must call it.
        """
        cache = DynamicCache()
        for layer in range(len(self._cache)):
            keys, values = self.gather_kv(layer)
            if keys is not None and values is not None:
                cache.update(keys.unsqueeze(0), values.unsqueeze(0), layer)
        return cache if self._group.rank == self._tensor.rank == 0 else None

    def _positions(self, rank: int) -> list[range]:
        """True positions of the tokens in a rank's shard, in the order in which it holds them."""
        spans = (span for round in range(self.plan.rounds) for span in self.plan.spans(rank, round))
        held = [range(span.start, span.stop) for span in spans if span.kind is Kind.BLOCK]
        if rank == self.plan.tail_rank:
            held.append(range(self.plan.query_start, self._cache.total))
        return held


def forward(attachment: Attachment, ids: Tensor, positions: Tensor, cache: ShardCache, group: Group) -> Tensor:
    """One pass of the model over this rank's rows (1, rows); logits (vocab,) fp32 of the last row, rank 0's on all."""
    return group.broadcast(next_logits(attachment, ids, positions, cache))


def next_logits(attachment: Attachment, ids: Tensor, positions: Tensor, cache: ShardCache) -> Tensor:
    """One pass of the model over this rank's rows (1, rows); its own logits (vocab,) fp32 of the last row."""
    output = attachment.model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return output.logits[0, -1].float().contiguous()


class Stopwatch:
    """Seconds since it was made, with a GPU's queued work finished at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronize(device)
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far."""
        synchronize(self._device)
        return time.perf_counter() - self._start
