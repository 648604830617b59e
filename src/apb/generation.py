"""Choosing tokens and turning them into text: transformers' processors and criteria around a session."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .errors import Cancelled, InputError, NotFinite, at_least
from .hf import sampling as checkpoint
from .hf.guiding import check_schema

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

    from .distributed.collectives import Group
    from .session import Session


# Temperatures below this would overflow fp32 scores; the most likely token is certain well above it.
COLDEST = 1e-30


def check_seed(seed: int) -> None:
    """InputError unless ``seed`` is a whole number of 64 bits, as torch's generators require."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise InputError(f"The seed must be a whole number from -2**63 to 2**64 - 1, not {seed!r}.")


@dataclass(frozen=True)
class Sampling:
    """The settings by which tokens are chosen.

    The checkpoint's generation configuration is followed (penalties, suppressed and bad words, minimum lengths, stop
    strings, min_p and the like), by transformers' own classes, except for its ``do_sample``, ``temperature``, ``top_k``
    and ``top_p``: an answer is greedy unless a temperature is given, and draws from all tokens unless top_k or top_p
    is.

    Attributes:
        max_new_tokens: maximum length of the answer.
        temperature: 0 for the most likely token (as is any below 1e-30), else the divisor of the logits.
        top_k, top_p, min_p: keep only the k most likely tokens, the likeliest that together hold p, or those at least
            ``min_p`` times as likely as the likeliest; None keeps all.
        repetition_penalty: the checkpoint's, if None; as in transformers.
        frequency_penalty, presence_penalty: taken from the score of a token for every time that the answer has it, or
            if the answer has it at all.
        stop: texts at which the answer ends, without them.
        top_logprobs: keep the log-probabilities of every token and of the so many likeliest in its place, by the
            model's own scores; None keeps none.
        schema: a JSON schema, as a text, that the answer follows; it needs the library llguidance.
        seed: of the random draws; the same seed gives the same text on the same set-up. None picks one at random.
        logits_processor, stopping_criteria: further ones of transformers, applied in the order of ``generate``.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    schema: str | None = None
    seed: int | None = None
    logits_processor: LogitsProcessorList | None = None
    stopping_criteria: StoppingCriteriaList | None = None

    def __post_init__(self) -> None:
        at_least("max_new_tokens", self.max_new_tokens, 1)
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"The temperature must be a number of 0 or more, not {self.temperature}.")
        if self.top_k is not None:
            at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be from 0 to 1, not {self.min_p}.")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"The repetition penalty must be a number above 0, not {self.repetition_penalty}.")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"The {name} must be from -2 to 2, not {getattr(self, name)}.")
        if not all(self.stop):
            raise InputError("A text to stop at is empty; leave it out.")
        if self.top_logprobs is not None:
            at_least("top_logprobs", self.top_logprobs, 0)
        if self.schema is not None:
            check_schema(self.schema)
        if self.seed is not None:
            check_seed(self.seed)

    @property
    def draws(self) -> bool:
        """True if tokens are sampled; else the most likely one is taken."""
        return self.temperature >= COLDEST


# Fields of an answer that are told only where there is something to tell.
_IF_ANY = ("propagation", "choice", "read_for", "scored", "notes")


@dataclass(frozen=True)
class Scored:
    """A token of an answer with its log-probability, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: Tensor, token: int, top: int) -> Scored:
        """From logits (vocab,) fp32."""
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(top, len(logits)))
        return cls(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


@dataclass
class Generation:
    """An answer and how it came about; :meth:`to_dict` is what ``apb generate --json`` prints.

    ``token_ids`` are all generated tokens, EOS included; ``exact`` is True if prefill and decode were those of full
    attention; ``decode`` is how the tokens were generated: {"method", "exact", "share"}, the share of the kept keys
    that a token attended to; ``propagation`` is set if not all of the document's rows went through all layers:
    {"layer", "rows", "share"}, the last layer that read them all, and how many went on; ``prompt_tokens`` is the number
    of tokens read;
    ``choice`` is the reason for the choice of the strategy "auto"; ``read_for`` says for which question a
    :class:`apb.Document` was read; ``scored`` are the tokens' log-probabilities, where they were asked for; ``notes``
    are sentences for the user.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    strategy: str
    exact: bool
    plan: dict[str, int]
    timing: dict[str, float]
    memory: dict[str, int]
    fingerprint: dict[str, str]
    decode: dict[str, Any]
    prompt_tokens: int
    propagation: dict[str, Any] | None = None
    choice: str | None = None
    read_for: str | None = None
    scored: list[Scored] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields but ``prompt_tokens`` as plain Python values; those without a value are left out."""
        fields = asdict(self)
        del fields["prompt_tokens"]
        return {name: value for name, value in fields.items() if value or name not in _IF_ANY}


# Signals that rank 0 sends to the others in every step.
_GOES_ON, _CANCELLED, _NO_LOGITS, _NO_SCORES, _FAILED = range(5)


class Choosing:
    """Chooses the tokens after a session. Rank 0 chooses and broadcasts, so that all ranks get the same tokens."""

    def __init__(
        self,
        session: Session,
        sampling: Sampling,
        model: Any,
        group: Group,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Choose tokens as :func:`decode` does, with the same arguments."""
        device = session.logits.device
        self._session = session
        self._sampling = sampling
        self._group = group
        self._cancelled = cancelled
        self._read = len(session.token_ids)
        self._ids = torch.empty(1, self._read + sampling.max_new_tokens, dtype=torch.long, device=device)
        self._ids[0, : self._read] = torch.tensor(session.token_ids, device=device)
        self._processors = checkpoint.processors(model, sampling, self._ids[:, : self._read], tokenizer)
        self._criteria = checkpoint.criteria(model, sampling, tokenizer, device)
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._failure: Exception | None = None

    def queued(self) -> Tensor:
        """The next choice (3,) long, which the device may still be at work on: to be read, and given to :meth:`taken`.

        The choices of several sessions can so be queued before the first one is waited for.
        """
        session, ids, read = self._session, self._ids, self._read
        choice = torch.zeros(3, dtype=torch.long, device=ids.device)
        if self._group.rank == 0 and self._cancelled is not None and self._cancelled():
            choice[2] = _CANCELLED
        elif self._group.rank == 0:
            # The maximum is not finite if any logit is NaN or infinity, or all are -infinity. The error is raised
            # later: waiting for the logits here would leave the GPU idle.
            wrong = ~session.logits.max().isfinite()
            # Processors may write into their input; the session's logits must not change.
            logits = session.logits.masked_fill(wrong, 0.0).unsqueeze(0)
            try:
                scores = self._processors(_long(ids[:, :read]), _float(logits))
                token, lost = _pick(scores, self._sampling.draws, self._generator)
                ids[0, read] = choice[0] = token
                if self._criteria:
                    choice[1] = self._criteria(_long(ids[:, : read + 1]), _float(scores)).any()
                choice[2] = torch.where(wrong, _NO_LOGITS, torch.where(lost, _NO_SCORES, _GOES_ON))
            except Exception as error:  # of a processor; the other ranks wait for a choice
                self._failure, choice[2] = error, _FAILED
        self._read += 1
        return self._group.broadcast(choice)

    def taken(self, choice: Sequence[int]) -> tuple[int, bool]:
        """The token of a choice, and True if the model or a criterion ended there; raises what :func:`decode` does."""
        token_id, ended, state = choice
        if state == _FAILED:
            raise self._failure or RuntimeError("Choosing a token failed on rank 0.")
        if state == _CANCELLED:
            raise Cancelled("The answer was cancelled.")
        if state == _NO_LOGITS:
            raise NotFinite(self._session.what_is_not_finite(self._group))
        if state == _NO_SCORES:
            raise NotFinite("Logits processors left no token that could be drawn; ask for other settings of sampling.")
        return token_id, bool(ended)


def decode(
    session: Session,
    sampling: Sampling,
    model: Any,
    group: Group,
    cancelled: Callable[[], bool] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    read: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, bool]]:
    """Generate tokens after a session: yields (token id, True if the model or a criterion ended there).

    All ranks raise :class:`apb.Cancelled` once rank 0's ``cancelled``, called before every token, returns True, and
    :class:`apb.NotFinite` if no token can be chosen; and whatever a processor or criterion raises on rank 0, the others
    a RuntimeError then.
    ``read`` has the session read a token, on every rank; by default :meth:`apb.Session.extend` does. The checkpoint's
    stop strings and a schema need the ``tokenizer``.
    """
    choosing = Choosing(session, sampling, model, group, tokenizer, cancelled)
    for step in range(sampling.max_new_tokens):
        token_id, ended = choosing.taken(choosing.queued().tolist())
        yield token_id, ended
        if ended or step + 1 == sampling.max_new_tokens:
            return
        if read is None:
            session.extend([token_id])
        else:
            read(token_id)


# transformers annotates its processors and criteria with torch's legacy tensor types.
def _long(x: Tensor) -> torch.LongTensor:
    return cast(torch.LongTensor, x)


def _float(x: Tensor) -> torch.FloatTensor:
    return cast(torch.FloatTensor, x)


def _pick(scores: Tensor, draws: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The token chosen by scores (1, vocab), and True if there was none to draw; both on the scores' device."""
    if not draws:
        return scores[0].argmax(), torch.zeros((), dtype=torch.bool, device=scores.device)
    chances = scores[0].softmax(-1)
    lost = ~chances.sum().isfinite()
    return torch.multinomial(chances.masked_fill(lost, 1.0), 1, generator=generator)[0], lost
