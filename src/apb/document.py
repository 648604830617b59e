"""A document that stays read: asked any number of questions, each of which reads its own rows alone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .answering import whole
from .asking import Asking, Question
from .generation import Generation, Sampling
from .hf.attach import CLOSED
from .prompt import Prompt
from .session import Session

if TYPE_CHECKING:
    from .engine import Engine

THIS, ANOTHER, NONE = "this question", "another question", "no question"
"""For which question the document was read, seen from the question that is asked."""


class Document:
    """A text that an engine has read, in the keys and values of its ranks. Make one with :meth:`apb.Engine.read`.

    Questions are read exactly over what is kept, and forgotten when the next one is asked, unless they are kept as
    turns of a conversation. Under an exact strategy answers are those of reading everything anew; under another one
    the document's own keys and values are approximate, and depend on the question that it was read for.

    Under several ranks every rank makes the same calls and gets the same answers.

    Attributes:
        plan: how the document was read; its query is what it was read for.
        read_for: the questions that it was read for, if any.
        timing: ``prefill_s``, seconds this rank took.
    """

    def __init__(
        self, engine: Engine, asking: Asking, session: Session, prompt: Prompt, read_for: tuple[Question, ...]
    ) -> None:
        """Called by :meth:`apb.Engine.read`, with the session of the prompt by which the document was read."""
        self.plan = session.plan
        self.read_for = read_for
        self.timing = dict(session.timing)
        self._engine = engine
        self._asking = asking
        self._prompt = engine.reading.arranged(prompt)
        self._query = prompt.query
        self._cache = session.cache
        self._logits = session.logits
        # What the question left behind: it is answered from there, as if it had been asked at once.
        self._read = self._cache.cut(self.plan.query_start)
        self._kept: tuple[int, ...] = ()  # tokens after the document that stay
        self._answer: Generation | None = None  # the last kept answer, of which the last token has not been read
        self._session: Session | None = None

    @property
    def exact(self) -> bool:
        """True if its keys and values are those of full attention, whatever is asked."""
        return self.plan.exact

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens that stay read: prefix, document, kept turns."""
        return self._prompt.prefix + self._prompt.document + self._kept

    def read_for_as_seen_from(self, query: Question) -> str:
        """For what the document was read, seen from a question: :data:`THIS`, :data:`ANOTHER` or :data:`NONE`."""
        if not self.read_for:
            return NONE
        return THIS if not self._kept and self._asking.query(query) == self._query else ANOTHER

    def prefill(self, query: Question, *, max_new_tokens: int = 1) -> Session:
        """Read a question; the session of document and question. It ends when the document is asked again.

        Args:
            query: the question, a text if the document was given as text, else token ids.
            max_new_tokens: tokens to reserve room for after the question.

        Raises:
            InputError: an empty question, or one that does not fit with its answer.
        """
        if self._answer is None:
            return self._after(self._asking.query(query), max_new_tokens)
        unread = self._answer.token_ids[-1:]
        return self._after(self._asking.turn(unread, query), max_new_tokens)

    def ask(
        self, query: Question, *, keep: bool = False, cancelled: Callable[[], bool] | None = None, **sampling: Any
    ) -> Generation:
        """Answer a question; ``sampling`` as in :class:`apb.generation.Sampling`.

        Args:
            query: as in :meth:`prefill`.
            keep: keep question and answer, so that the next question is a further turn of the conversation.
            cancelled: rank 0's is called before every token; :class:`apb.Cancelled` is raised once it returns True.
            sampling: see above.
        """
        return whole(self._stream(query, Sampling(**sampling), keep, cancelled))

    def stream(
        self, query: Question, *, keep: bool = False, cancelled: Callable[[], bool] | None = None, **sampling: Any
    ) -> Generator[str, None, Generation]:
        """As :meth:`ask`, but yield the answer's text in pieces; the generator's return value is the answer."""
        self._engine.needed_tokenizer()
        return self._stream(query, Sampling(**sampling), keep, cancelled)

    def _stream(
        self, query: Question, sampling: Sampling, keep: bool, cancelled: Callable[[], bool] | None
    ) -> Generator[str, None, Generation]:
        seen = self.read_for_as_seen_from(query)
        session = self.prefill(query, max_new_tokens=sampling.max_new_tokens)
        answer = yield from self._engine.answering.stream(session, sampling, cancelled)
        answer.read_for = seen
        if keep:
            self._kept = tuple(session.token_ids[self.plan.query_start :])
            self._answer = answer
            self._cache = session.cache
        return answer

    def _after(self, query: tuple[int, ...], max_new_tokens: int) -> Session:
        """The session after all that is kept and these tokens."""
        engine, start = self._engine, len(self.token_ids)
        if engine.closed:
            raise RuntimeError(CLOSED)
        prefix, everything = self._prompt.prefix, self._kept + query
        prompt = Prompt(prefix, self._prompt.document, everything, front=prefix)
        plan = replace(self.plan, query=len(everything))
        engine.check(plan, query, max_new_tokens)
        if self._session is not None:
            self._session.end("The document has been asked another question, and this session lasted until then.")
        self._cache.forget(start)
        if everything == self._query:
            self._cache.restore(self._read)
            session = engine.session(plan, prompt, self._cache, self._logits, 0.0, max_new_tokens)
        elif engine.turns_otherwise(start, plan.total):
            session = engine.prefill(prompt, max_new_tokens=max_new_tokens)
        else:
            logits, seconds = engine.read_on(self._cache, query, max_new_tokens)
            session = engine.session(plan, prompt, self._cache, logits, seconds, max_new_tokens)
        self._session = session
        return session
