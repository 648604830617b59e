"""A prompt that has been read: its cache, spread over the ranks, and the distribution of the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .distributed.collectives import Group
from .errors import InputError, NotFinite
from .hf.cache import ShardCache, dynamic_cache
from .hf.config import kv_heads
from .passes.alone import why_alone
from .passes.together import read_together
from .passes.tokens import Continuation, Decoder
from .planning.plan import Plan
from .prompt import check_tokens, whole_numbers

if TYPE_CHECKING:
    from transformers import DynamicCache

# Tokens scored in one pass: logits of more rows would take gigabytes.
_ROWS = 256


def token_scores(logits: Tensor, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (rows,) fp32 of a token in each row of logits (rows, vocab), and if it is the likeliest."""
    chosen = torch.tensor(list(token_ids), device=logits.device)
    log_probabilities = logits.float().log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1)
    return log_probabilities, logits.argmax(-1) == chosen


class Session:
    """The state of a prompt that :meth:`apb.Engine.prefill` has read. Every rank makes the same calls on its own.

    Attributes:
        logits: (vocab,) fp32, for the token after the last one read; the same on all ranks.
        plan: the plan the prompt was read by.
        timing: ``prefill_s``, seconds this rank took.
        token_ids: the prompt's tokens and those given to :meth:`extend`.
        decoding: the decode method, as an object.
    """

    def __init__(
        self,
        plan: Plan,
        cache: ShardCache,
        logits: Tensor,
        prefill_s: float,
        token_ids: Sequence[int],
        decoder: Decoder,
        new_tokens: int,
        read_again: Callable[[int], tuple[ShardCache, Tensor]],
        tensor: Group,
        limit: int | None,
    ) -> None:
        """Make a session; called by :meth:`apb.Engine.prefill`.

        Args:
            plan: how the prompt was read.
            cache: this rank's shard.
            logits: (vocab,) fp32 of the next token.
            prefill_s: seconds of the prefill.
            token_ids: the prompt's tokens.
            decoder: reads further tokens.
            new_tokens: number of new tokens that the cache has room for.
            read_again: reads the prompt anew as the beginning of a text of so many tokens, for its cache and the logits
                after it; see :meth:`extend`.
            tensor: the processes that share the weights of this rank.
            limit: positions that may be read; None: any number.
        """
        self.plan = plan
        self.logits = logits
        self.timing = {"prefill_s": prefill_s}
        self.token_ids = list(token_ids)
        self._cache = cache
        self._group = decoder.group
        self._tensor = tensor
        self._limit = limit
        self._decoder = decoder
        self._new_tokens = new_tokens
        self._read_again = read_again
        self._started: Continuation | None = None
        self.decoding = decoder.decoding
        self._ended: str | None = None

    @property
    def cache(self) -> ShardCache:
        """This rank's shard of the cache."""
        if self._ended is not None:
            raise RuntimeError(self._ended)
        return self._cache

    def end(self, reason: str) -> None:
        """Refuse all further use, with this reason: the cache is going to hold something else."""
        self._ended = reason

    def extend(self, token_ids: Sequence[int]) -> Tensor:
        """Read more tokens after the prompt, over all ranks' shards; return the new ``logits`` (vocab,).

        One token is a decode step; several are read in one pass. Exact unless the engine's decode method is not.
        If the text outgrows a length beyond which RoPE rotates every position by other angles (longrope), prompt and
        answer are read again with those, as in transformers.
        """
        token_ids, total = self._checked(token_ids, read=len(token_ids))
        if self._switches(total):
            self._start_over(total)
            token_ids = [*self.token_ids[self.plan.total :], *token_ids]
            del self.token_ids[self.plan.total :]
        self.logits = self._continuation.read(token_ids)
        self.token_ids.extend(token_ids)
        return self.logits

    @property
    def why_alone(self) -> str | None:
        """The reason why :func:`extend_together` cannot read its tokens; None if it can."""
        return why_alone(self._decoder.attachment)

    @property
    def why_apart(self) -> str | None:
        """The reason why its tokens are better read by passes of their own; None if there is none."""
        if self._continuation.stepped and not self._decoder.stepper.batched:
            return f"captured steps of the decode method {self.decoding.name!r} read one session"
        return self.why_alone

    def check_finite(self) -> None:
        """NotFinite, with what is known of where that began, if no next token can be chosen; every rank calls it."""
        if not self.logits.max().isfinite():
            raise NotFinite(self.what_is_not_finite(self._group))

    def score(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """How likely these tokens are to follow; the session stays as it is, so that others may be scored after them.

        They are read as :meth:`extend` reads several tokens, except for the last, which nothing follows.

        Returns:
            log_probabilities: (tokens,) fp32, of each token after those before it.
            likeliest: (tokens,) bool, True where greedy decoding would choose the token.
        """
        token_ids, total = self._checked(token_ids, read=len(token_ids) - 1)
        switches = self._switches(total)
        again = self.token_ids[self.plan.total :] if switches else []
        logits = self._start_over(total) if switches else self.logits
        self._cache.mark(self._cache.total, self._cache.states)
        wanted = [*again, *token_ids]
        parts = [token_scores(logits.unsqueeze(0), wanted[:1])]
        for start in range(0, len(wanted) - 1, _ROWS):
            rows = self._continuation.read_rows(wanted[start : min(start + _ROWS, len(wanted) - 1)])
            parts.append(token_scores(rows, wanted[start + 1 : start + 1 + _ROWS]))
        if switches:
            self._start_over(len(self.token_ids))
            if again:
                self._continuation.read(again)
        else:
            self._cache.forget(len(self.token_ids))
        log_probabilities, likeliest = (torch.cat(part)[len(again) :] for part in zip(*parts, strict=True))
        if log_probabilities.isnan().any():
            raise NotFinite(self.what_is_not_finite(self._group))
        return log_probabilities, likeliest

    def rewind(self, tokens: int, logits: Tensor) -> None:
        """Go back to the first ``tokens`` of what was read, after which the logits were these (vocab,)."""
        if any(tokens <= length < len(self.token_ids) for length in self._decoder.attachment.switches):
            self._start_over(tokens)
        else:
            self._cache.forget(tokens)
        del self.token_ids[tokens:]
        self.logits = logits

    def _checked(self, token_ids: Sequence[int], read: int) -> tuple[Sequence[int], int]:
        """The tokens as Python's own numbers, and the length of the text once ``read`` of them are; or InputError."""
        if self._ended is not None:
            raise RuntimeError(self._ended)
        token_ids = whole_numbers(token_ids)
        if not token_ids:
            raise InputError("No tokens were given to read; pass at least one token id.")
        check_tokens(token_ids, self._decoder.attachment.vocabulary)
        total = len(self.token_ids) + read
        if self._limit is not None and total > self._limit:
            raise InputError(
                f"With {read} more tokens there are {total}, {total - self._limit} more than the model's "
                f"{self._limit} positions; read fewer, or make the engine with allow_extrapolation=True."
            )
        return token_ids, total

    def _switches(self, total: int) -> bool:
        """True if a text of ``total`` tokens is rotated by other angles than the text so far."""
        return any(len(self.token_ids) <= length < total for length in self._decoder.attachment.switches)

    def _start_over(self, total: int) -> Tensor:
        """Read the prompt again, as the beginning of a text of ``total`` tokens; the old cache is freed first.

        Returns the logits (vocab,) after the prompt.
        """
        self._started = None
        del self._cache
        self._cache, logits = self._read_again(total)
        return logits

    @property
    def _continuation(self) -> Continuation:
        """What reads tokens; it begins with the first one, so that what is never continued costs nothing."""
        if self._started is None:
            self._started = self._decoder.start(self._cache, self._new_tokens)
        return self._started

    def what_is_not_finite(self, everyone: Group) -> str:
        """A sentence about logits that are not finite; every process must call it, and all get the same one.

        It names the first such layer, if layers were checked (see :class:`apb.NotFinite`).
        """
        unknown = len(self._cache)
        first = self._decoder.attachment.first_not_finite()
        seen = torch.tensor([unknown if first is None else first], device=self.logits.device)
        layer = int(everyone.all_gather(seen).wait().min())
        where = (
            f"the attention of layer {layer} was the first to give such numbers"
            if layer < unknown
            else "APB_CHECK_FINITE=1 in the environment names the layer where that begins"
            if self._decoder.attachment.finite is None
            else "the attention of all layers was finite, so that begins after the last one's"
        )
        told = len(self.token_ids) - self.plan.total
        return (
            f"The model's scores for the next token, {told} tokens into the answer, are NaN or infinite: {where}; "
            "use a wider dtype (--dtype float32), or other weights."
        )

    @property
    def captured(self) -> bool:
        """True if the last token was read by CUDA graphs."""
        return self._started is not None and self._started.captured

    @property
    def share(self) -> float:
        """Share of this rank's keys that a new token attends to; 1 before any."""
        return 1.0 if self._started is None else self._started.share

    def gather_kv(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The cache of one layer: keys and values (kv_heads, tokens, head_dim), on rank 0; (None, None) elsewhere.

        Tokens are in document order: prefix, document, query, then those read since. Above a layer of propagation they
        are those that went on, and a document's layers with a sliding window have only the last ones, which further
        tokens see; :meth:`positions` tells which. Every rank must call it.
        """
        places = self._places(layer)
        keys, values = (self._gather(shard, places) for shard in self._cache.shard(layer))
        if keys is None or values is None:
            return None, None
        if not self._shares_heads(keys, layer):
            return (keys.transpose(0, 1), values.transpose(0, 1)) if self._tensor.rank == 0 else (None, None)
        parts = [self._tensor.gather(x.contiguous()) for x in (keys, values)]
        if parts[0] is None or parts[1] is None:
            return None, None
        return torch.cat(parts[0], 1).transpose(0, 1), torch.cat(parts[1], 1).transpose(0, 1)

    def positions(self, layer: int) -> list[int]:
        """True positions of the tokens of :meth:`gather_kv`, on all ranks; every rank must call it."""
        return sorted(position for held in self._places(layer) for run in held for position in run)

    def cache_bytes(self) -> int:
        """Bytes of keys and values that this rank holds, over all layers."""
        shards = (self.cache.shard(layer) for layer in self._cache.indices)
        return sum(part.numel() * part.element_size() for shard in shards for part in shard)

    def to_dynamic_cache(self) -> DynamicCache | None:
        """The whole cache as transformers' own, on rank 0, for ``model.generate`` to continue from; None elsewhere.

        Close the engine first (:meth:`apb.Engine.close`), and pass ``generate`` all tokens so far and at least one
        more. Every rank must call it.

        Raises:
            InputError: layers hold different tokens, by propagation or because a document keeps only what windows need,
                or the model's code has a cache of its own (MiniMax).
        """
        if len({len(self.positions(layer)) for layer in self._cache.indices}) > 1:
            raise InputError(
                "The layers of this cache hold different tokens, because of propagation or of windows in a document, "
                "and transformers' generate takes the same for all; read the prompt anew, without propagation."
            )
        layers = []
        for layer in self._cache.indices:
            keys, values = self.gather_kv(layer)
            if keys is not None and values is not None:
                layers.append((layer, keys, values))
        if not self._group.rank == self._tensor.rank == 0:
            return None
        return dynamic_cache(layers, self._cache.states, self._decoder.attachment.model.config)

    def _shares_heads(self, keys: Tensor, layer: int) -> bool:
        """True if the processes of a rank hold different KV heads; some models hold all of them in every process."""
        whole = kv_heads(self._decoder.attachment.model.config, layer)
        return self._tensor.size > 1 and keys.shape[1] * self._tensor.size == whole

    def _places(self, layer: int) -> list[list[range]]:
        """For every rank, the true positions of the tokens in its shard of a layer, in the order it holds them."""
        if layer not in self.cache.indices:
            raise InputError(f"There is no layer {layer}; the model has layers 0 to {len(self._cache) - 1}.")
        mine = self._cache.positions(layer)
        if self._group.size == 1:
            return [mine]
        device = self.logits.device
        count = torch.tensor([len(mine)], device=device)
        most = int(self._group.all_gather(count).wait().max())
        bounds = torch.zeros(most, 2, dtype=torch.long, device=device)
        if mine:
            bounds[: len(mine)] = torch.tensor([[each.start, each.stop] for each in mine], device=device)
        every = self._group.all_gather(bounds).wait().tolist()
        return [[range(start, stop) for start, stop in rank if start < stop] for rank in every]

    def _gather(self, shard: Tensor, places: list[list[range]]) -> Tensor | None:
        """All ranks' shards (tokens, kv_heads, head_dim) in document order, on rank 0."""
        width = max(sum(map(len, held)) for held in places)
        padded = shard.new_zeros(width, *shard.shape[1:])
        padded[: shard.shape[0]] = shard
        parts = self._group.gather(padded)
        if parts is None:
            return None
        # The index in document order at which a run of tokens begins: the number of tokens before it.
        starts, before = {}, 0
        for run in sorted((run for held in places for run in held), key=lambda run: run.start):
            starts[run] = before
            before += len(run)
        whole = shard.new_empty(before, *shard.shape[1:])
        for held, part in zip(places, parts, strict=True):
            row = 0
            for run in held:
                whole[starts[run] : starts[run] + len(run)] = part[row : row + len(run)]
                row += len(run)
        return whole


def extend_together(sessions: Sequence[Session], token_ids: Sequence[int], rows: int = 1) -> None:
    """Read one token after each of several sessions in one pass, as :meth:`Session.extend` reads it after each, up to
    rounding; every rank calls it. The sessions are of one model, by any reading, and none has a reason to be alone.
    ``rows``: as of :func:`apb.passes.together.read_together`.

    Whatever is raised, no session has been extended.
    """
    for session, token in zip(sessions, token_ids, strict=True):
        session._checked([token], read=1)
    logits = read_together([session._continuation for session in sessions], token_ids, rows)
    for session, token, row in zip(sessions, token_ids, logits, strict=True):
        session.logits = row
        session.token_ids.append(token)
