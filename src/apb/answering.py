"""Answers after a session: tokens chosen one by one, their text, and how it all came about."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from .detokenizing import Detokenizer, Stops
from .distributed.collectives import Group
from .errors import NotFinite
from .generation import Generation, Sampling, Scored, decode
from .hardware import Stopwatch, fingerprint, peak_bytes
from .hf.identity import quantization
from .hf.sampling import left_out
from .session import Session, extend_together

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
        steps = self._steps(session, sampling, cancelled, scored, read)
        while True:
            try:
                _, piece, _ = next(steps)
            except StopIteration as stop:
                return cast(Generation, stop.value)
            if piece:
                yield piece

    def together(self, asked: Sequence[tuple[Session, Sampling]], rows: int) -> list[Generation | NotFinite]:
        """The answers of several sessions, in passes that read a token of each; every rank calls it.

        Args:
            asked: the sessions, of one model by any reading, and how their tokens are chosen.
            rows: of a captured step at least; see :func:`apb.passes.together.read_together`.

        Returns:
            the answers, or where one could not be written the error.
        """
        sessions = [session for session, _ in asked]
        writing = {number: self._steps(*each, None, read=_has_been_read) for number, each in enumerate(asked)}
        found: dict[int, Generation | NotFinite] = {}
        while writing:
            unread: dict[int, int] = {}
            for number, steps in list(writing.items()):
                try:
                    token, _, goes_on = next(steps)
                except (StopIteration, NotFinite) as end:  # the latter on all ranks
                    found[number] = end if isinstance(end, NotFinite) else end.value
                    del writing[number]
                else:
                    unread |= {number: token} if goes_on else {}
            self._read([(sessions[number], token) for number, token in unread.items()], rows)
        return [found[number] for number in range(len(asked))]

    def _read(self, unread: Sequence[tuple[Session, int]], rows: int) -> None:
        """Have sessions read a token each: in one pass, or one by one if the model or the memory leaves no choice."""
        alone = any(session.why_alone is not None for session, _ in unread)
        if unread and not alone:
            try:
                return extend_together([session for session, _ in unread], [token for _, token in unread], rows)
            except torch.OutOfMemoryError:
                if self.everyone.size > 1:  # the others do not know
                    raise
            except RuntimeError:
                if unread[0][0].why_alone is None:  # the pass has not found a reason
                    raise
        for session, token in unread:
            session.extend([token])

    def _steps(
        self,
        session: Session,
        sampling: Sampling,
        cancelled: Callable[[], bool] | None,
        scored: Callable[[Scored], None] = lambda score: None,
        read: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, str, bool], None, Generation]:
        """Yield every token with the text that it completes, and True if it is to be read before the next one."""
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
            last = ended or len(token_ids) == sampling.max_new_tokens
            piece = "" if detokenizer is None else stops.add(detokenizer.add(token, last), last)
            yield token, piece, not last and not stops.found
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


def _has_been_read(token: int) -> None:
    """What :func:`apb.generation.decode` calls for a token that its session has read already."""


def whole(pieces: Generator[str, None, Generation]) -> Generation:
    """The result of a stream, read to its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value
