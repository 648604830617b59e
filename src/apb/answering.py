"""Answers after a session: tokens chosen one by one, their text, and how it all came about."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .detokenizing import Detokenizer, Stops
from .distributed.collectives import Group
from .generation import Generation, Sampling, Scored, decode
from .hardware import Stopwatch, fingerprint, peak_bytes
from .hf.identity import quantization
from .hf.sampling import left_out
from .session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answering:
    """Answers sessions of one engine.

    Attributes:
        model, tokenizer: the engine's.
        devices: those that the model is on, the first one first.
        everyone: all processes at work on a prompt.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    devices: Sequence[torch.device]
    everyone: Group

    def stream(
        self,
        session: Session,
        sampling: Sampling,
        cancelled: Callable[[], bool] | None,
        scored: Callable[[Scored], None] = lambda score: None,
        read: Callable[[int], None] | None = None,
    ) -> Generator[str, None, Generation]:
        """Yield pieces of text as tokens are chosen (empty ones left out); return the Generation.

        ``scored`` is called with every token's log-probabilities, if they are asked for, before the piece it ends in.
        ``read``: as in :func:`apb.generation.decode`.
        """
        watch = Stopwatch(self.devices[0])
        detokenizer = Detokenizer(self.tokenizer) if self.tokenizer is not None else None
        token_ids: list[int] = []
        scores: list[Scored] = []
        stops, ended = Stops(sampling.stop), False
        for token, ended in decode(session, sampling, self.model, self.everyone, cancelled, self.tokenizer, read):
            token_ids.append(token)
            if sampling.top_logprobs is not None:
                scores.append(Scored.of(session.logits, token, sampling.top_logprobs))
                scored(scores[-1])
            if detokenizer is not None:
                last = ended or len(token_ids) == sampling.max_new_tokens
                piece = stops.add(detokenizer.add(token, last), last)
                if piece:
                    yield piece
                if stops.found:
                    break
        result = self._result(session, stops.text, token_ids, ended or stops.found, watch.seconds())
        result.scored = scores
        result.notes += left_out(self.model, sampling, self.tokenizer)
        return result

    def _result(self, session: Session, text: str, token_ids: list[int], ended: bool, decode_s: float) -> Generation:
        # The slowest and the largest rank count, and every rank reports the same.
        device = self.devices[0]
        largest = max(map(peak_bytes, self.devices))
        figures = torch.tensor(
            [session.timing["prefill_s"], decode_s, largest, session.share], dtype=torch.float64, device=device
        )
        every = self.everyone.all_gather(figures).wait()
        prefill_s, decode_s, peak, _ = every.amax(0).tolist()
        share = float(every[:, 3].mean())
        decoded_exactly = session.decoding.exact or share >= 1
        return Generation(
            text=text,
            token_ids=token_ids,
            finish_reason="stop" if ended else "length",
            strategy=session.plan.strategy,
            exact=session.plan.exact and decoded_exactly,
            plan=session.plan.to_dict(),
            timing={
                "prefill_s": prefill_s,
                "decode_s": decode_s,
                "decode_tokens_per_s": len(token_ids) / decode_s if decode_s else 0.0,
            },
            memory={"peak_bytes": int(peak)},
            fingerprint=fingerprint(device, self.model.dtype) | self._quantized(),
            decode={"method": session.decoding.name, "exact": decoded_exactly, "share": share},
            prompt_tokens=session.plan.total,
            propagation=session.plan.propagated(),
            choice=session.plan.reason,
        )

    def _quantized(self) -> dict[str, str]:
        name = quantization(self.model)
        return {} if name is None else {"quantization": name}


def whole(pieces: Generator[str, None, Generation]) -> Generation:
    """The result of a stream, read to its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value
