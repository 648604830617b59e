"""Answers after a session: tokens chosen one by one, their text, and how it all came about."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .detokenizing import Detokenizer, Stops
from .distributed.collectives import Group
from .errors import InputError, NotFinite
from .generation import Choosing, Generation, Sampling, Scored, decode
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
        watch = Stopwatch(self.devices[0])
        text = _Text(session, sampling, self.tokenizer)
        for token, ended in decode(session, sampling, self.model, self.everyone, cancelled, self.tokenizer, read):
            piece = text.add(token, ended)
            if text.scores:
                scored(text.scores[-1])
            if piece:
                yield piece
            if text.over:
                break
        return self._result(text, watch.seconds())

    def together(self, asked: Sequence[tuple[Session, Sampling]], rows: int) -> list[Generation | Exception]:
        """The answers of several sessions, in passes that read a token of each; every rank calls it.

        Sessions whose tokens cannot be read with others', or not by captured steps, read each its own.

        Args:
            asked: the sessions, of one model by any reading, and how their tokens are chosen.
            rows: of a captured step at least; see :func:`apb.passes.together.read_together`.

        Returns:
            the answers; where one could not be written, the :class:`apb.InputError`, :class:`apb.NotFinite`, or, of a
            process that works alone, ``torch.OutOfMemoryError``.
        """
        watch = Stopwatch(self.devices[0])
        texts = [_Text(*each, self.tokenizer) for each in asked]
        choosing: dict[int, Choosing] = {}
        found: dict[int, Generation | Exception] = {}
        for number, each in enumerate(asked):
            with _failing(found, number):
                choosing[number] = Choosing(*each, self.model, self.everyone, self.tokenizer)
        together = rows > 1 and all(session.why_apart is None for session, _ in asked)
        while choosing:
            # One wait for all: where processes share a GPU, each wait is for the others' turns.
            choices = torch.stack([each.queued() for each in choosing.values()]).tolist()
            for number, choice in zip(choosing, choices, strict=True):
                with _failing(found, number):
                    texts[number].add(*choosing[number].taken(choice))
                    if texts[number].over:
                        found[number] = self._result(texts[number], watch.seconds())
            choosing = {number: each for number, each in choosing.items() if number not in found}
            unread = {number: (asked[number][0], texts[number].token_ids[-1]) for number in choosing}
            together = together and bool(unread) and self._read_together([*unread.values()], rows)
            if not together:
                for number, (session, token) in unread.items():
                    with _failing(found, number, memory=self.everyone.size == 1):
                        session.extend([token])
            choosing = {number: each for number, each in choosing.items() if number not in found}
        return [found[number] for number in range(len(asked))]

    def _read_together(self, unread: Sequence[tuple[Session, int]], rows: int) -> bool:
        """Have sessions read a token each in one pass; False if the memory or the model's code does not let them."""
        try:
            extend_together([session for session, _ in unread], [token for _, token in unread], rows)
        except torch.OutOfMemoryError:
            if self.everyone.size > 1:  # the others do not know
                raise
            return False
        except RuntimeError:
            if unread[0][0].why_apart is None:  # the pass has not found a reason
                raise
            return False
        return True

    def _result(self, text: _Text, decode_s: float) -> Generation:
        session = text.session
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
            text=text.stops.text,
            token_ids=text.token_ids,
            finish_reason="stop" if text.ended else "length",
            strategy=session.plan.strategy,
            exact=session.plan.exact and decoded_exactly,
            plan=session.plan.to_dict(),
            timing={
                "prefill_s": prefill_s,
                "decode_s": decode_s,
                "decode_tokens_per_s": len(text.token_ids) / decode_s if decode_s else 0.0,
            },
            memory={"peak_bytes": int(peak)},
            fingerprint=fingerprint(device, self.model.dtype) | self._quantized(),
            decode={"method": session.decoding.name, "exact": decoded_exactly, "share": share},
            prompt_tokens=session.plan.total,
            propagation=session.plan.propagated(),
            choice=session.plan.reason,
            scored=text.scores,
            notes=left_out(self.model, text.sampling, self.tokenizer),
        )

    def _quantized(self) -> dict[str, str]:
        name = quantization(self.model)
        return {} if name is None else {"quantization": name}


@contextmanager
def _failing(found: dict[int, Generation | Exception], number: int, memory: bool = False) -> Iterator[None]:
    """Note an answer's error in its place: one that all ranks raise, or that the memory is full."""
    kept: tuple[type[Exception], ...] = (InputError, NotFinite, *([torch.OutOfMemoryError] if memory else []))
    try:
        yield
    except kept as error:
        found[number] = type(error)(*error.args)  # what was raised holds frames, and these all the sessions


class _Text:
    """An answer as it is written.

    Attributes:
        session, sampling: what it follows, and how its tokens are chosen.
        token_ids: those so far.
        scores: their log-probabilities, where they are asked for.
        stops: the text so far.
        ended: True if the model, a criterion or a text to stop at has ended it.
    """

    def __init__(self, session: Session, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.session = session
        self.sampling = sampling
        self.token_ids: list[int] = []
        self.scores: list[Scored] = []
        self.stops = Stops(sampling.stop)
        self.ended = False
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)

    @property
    def over(self) -> bool:
        """True if no token follows."""
        return self.ended or len(self.token_ids) == self.sampling.max_new_tokens

    def add(self, token: int, ended: bool) -> str:
        """Add a token, with which the answer ended or not; the piece of text that it completes."""
        self.token_ids.append(token)
        self.ended = ended
        if self.sampling.top_logprobs is not None:
            self.scores.append(Scored.of(self.session.logits, token, self.sampling.top_logprobs))
        if self._detokenizer is None:
            return ""
        piece = self.stops.add(self._detokenizer.add(token, self.over), self.over)
        self.ended |= self.stops.found
        return piece


def whole(pieces: Generator[str, None, Generation]) -> Generation:
    """The result of a stream, read to its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value
