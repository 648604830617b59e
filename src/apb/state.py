"""What a rank keeps of a document that stays read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .asking import Question
from .hf.cache import ShardCache
from .hf.tail import Tail
from .planning.plan import Plan
from .prompt import Prompt
from .session import Session

SEAM = 16
"""Tokens at a document's end that may change where its text goes on."""
ROOM = 512
"""Tokens that there is room for after a document: for more its keys and values are copied to a larger storage."""


@dataclass
class State:
    """What one rank keeps of a document.

    Attributes:
        plan: how it was read.
        prefix, document: its tokens as they were read.
        query: the tokens of what it was read for.
        read_for: the questions that these are of, if any.
        compressor: name of what chose the pairs that blocks passed on.
        cache: keys and values of prefix, document and kept turns.
        tail: those of ``query``, which is answered from there as if it had been asked at once.
        logits: (vocab,) fp32, after ``query``.
        prefill_s: seconds it took to read.
        kept: tokens after the document that stay.
        unread: the last token of the last kept answer, which has been chosen but not read.
        index_s: seconds it took to make the decode method's indexes.
        here: False while keys and values are in host memory and not on the device.
    """

    plan: Plan
    prefix: tuple[int, ...]
    document: tuple[int, ...]
    query: tuple[int, ...]
    read_for: tuple[Question, ...]
    compressor: str
    cache: ShardCache
    tail: Tail
    logits: Tensor
    prefill_s: float
    kept: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()
    index_s: float = 0.0
    here: bool = True

    @classmethod
    def of_session(cls, session: Session, prompt: Prompt, read_for: tuple[Question, ...], compressor: str) -> State:
        """The state after a prompt (as it was read, in its arrangement), without its question.

        The session's cache goes with it: layers with a window keep only what further tokens see.
        """
        plan, cache = session.plan, session.cache
        tail, seconds = cache.cut(plan.query_start), session.timing["prefill_s"]
        cache.keep_windows(plan.query_start - SEAM)
        parts = prompt.prefix, prompt.document, prompt.query
        return cls(plan, *parts, read_for, compressor, cache, tail, session.logits, seconds)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens that stay read: prefix, document, kept turns."""
        return self.prefix + self.document + self.kept
