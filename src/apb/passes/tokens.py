"""Reading tokens after a prompt: decode, one token a pass, and further text, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..decoding import Decoding, Reader
from ..distributed.collectives import Group
from ..hf.attach import Attachment
from ..hf.cache import ShardCache
from ..layers.base import AttentionInput, LayerKind
from ..layers.shards import NewRows, merge_over_ranks, window_partial
from .step import Stepper

# Capturing graphs does not pay for answers of fewer tokens.
SHORTEST_CAPTURED = 8
# Back-ends under which single tokens may be read by a stepper's kernels.
_STEPPED = ("auto", "fused")


class Decoder:
    """Reader of tokens over the caches of an engine's sessions, by one decode method."""

    def __init__(self, attachment: Attachment, group: Group, decoding: Decoding, backend: str, graphs: bool) -> None:
        self.attachment = attachment
        self.group = group
        self.decoding = decoding
        self.backend = backend
        self.stepper = Stepper(attachment, decoding, group, graphs)

    def start(self, cache: ShardCache, new_tokens: int) -> Continuation:
        """Prepare to read after a prefill; ``new_tokens``: the expected number."""
        return Continuation(self, cache, new_tokens)

    def close(self) -> None:
        """Free all graphs."""
        self.stepper.close()


class Continuation:
    """Tokens read after one prompt, over this rank's shard of its cache.

    Attributes:
        decoder: its engine's.
        cache: the shard.
        capture: True if it is worth while to capture graphs for its tokens.
        stepped: True if its engine's stepper can read them one by one.
        reader: the decode method's, of this shard.
        captured: True if the last token was read by CUDA graphs.
    """

    def __init__(self, decoder: Decoder, cache: ShardCache, new_tokens: int) -> None:
        self.decoder = decoder
        self.cache = cache
        self.capture = new_tokens >= SHORTEST_CAPTURED
        self.stepped = decoder.backend in _STEPPED and decoder.stepper.why_not(cache) is None
        self.reader: Reader = decoder.decoding.prepare(cache, decoder.backend)
        self.captured = False

    @property
    def share(self) -> float:
        """Share of this rank's keys that a token attends to."""
        return self.reader.share

    def read(self, token_ids: Sequence[int]) -> Tensor:
        """Read tokens at the end, exactly in layers with a window; logits (vocab,) fp32 of the next, on all ranks."""
        if len(token_ids) == 1 and self.stepped:
            logits = self.decoder.stepper.step([self.cache], [self.reader], token_ids, self.capture)[0]
            self.captured = self.decoder.stepper.captured([self.cache])
            return logits
        self.captured = False
        return self._pass(token_ids, self.decoder.attachment.last_logits)

    def read_rows(self, token_ids: Sequence[int]) -> Tensor:
        """As :meth:`read`, always in one ordinary pass; logits (tokens, vocab) fp32 after each of the tokens."""
        self.captured = False
        return self._pass(token_ids, self.decoder.attachment.all_logits)

    def partial(self, layer: AttentionInput, first: int) -> tuple[Tensor, Tensor]:
        """Attention of new rows, from position ``first`` on, over the keys and values of this rank's shard.

        ``layer`` has the rows' q and the shard's k and v, which end with the rows' own where this rank keeps them; out
        and lse as of :meth:`apb.decoding.Reader.attend`.
        """
        rows = NewRows(first, self.cache.positions(layer.kept))
        if layer.kind is LayerKind.FULL:
            return self.reader.attend(layer, rows)
        return window_partial(layer, rows, self.decoder.backend)

    def _pass(self, token_ids: Sequence[int], run: Callable[[Tensor, Tensor, ShardCache], Tensor]) -> Tensor:
        """Read tokens in one ordinary pass; ``run``: the attachment's, whose logits are returned."""
        cache, decoder = self.cache, self.decoder
        start, count = cache.total, len(token_ids)
        device = decoder.attachment.devices[0]
        ids = torch.tensor([list(token_ids)], device=device)
        positions = torch.arange(start, start + count, device=device).unsqueeze(0)
        cache.expect(range(start, start + count))

        def attend(layer: AttentionInput) -> Tensor:
            keys = len(cache.near(layer.kept)[0])  # an empty shard comes with one dummy row
            layer = replace(layer, k=layer.k[:keys], v=layer.v[:keys])
            return merge_over_ranks(layer, *self.partial(layer, start), decoder.group).wait()

        with torch.no_grad(), decoder.attachment.running(attend, cache.recur, cache.total):
            return decoder.group.broadcast(run(ids, positions, cache))
