"""A document that stays read: asked any number of questions, each of which reads its own rows alone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .answering import whole
from .asking import ANOTHER, NONE, THIS, Asking, Question, check_reread
from .errors import InputError
from .generation import Generation, Sampling
from .hf.attach import CLOSED
from .hf.host import HostCopy
from .hf.tail import Tail
from .planning.plan import Plan
from .prompt import Prompt
from .session import Session
from .state import ROOM, SEAM, State

if TYPE_CHECKING:
    from .engine import Engine


# Rows that a growing document reads in one pass.
_ROWS = 4096


class Document:
    """A text that an engine has read, in the keys and values of its ranks. Make one with :meth:`apb.Engine.read`.

    Questions are read exactly over what is kept, and forgotten when the next one is asked, unless they are kept as
    turns of a conversation. Under an exact strategy answers are those of reading everything anew; under another one
    the document's own keys and values are approximate, and depend on the question that it was read for.

    Under several ranks every rank makes the same calls and gets the same answers.

    Attributes:
        state: what is kept of it.
    """

    def __init__(self, engine: Engine, asking: Asking, state: State) -> None:
        """Called by :meth:`apb.Engine.read` and :meth:`apb.Engine.load`."""
        self.state = state
        self._engine = engine
        self._asking = asking
        self._session: Session | None = None

    @property
    def plan(self) -> Plan:
        """How the document was read; its query is what it was read for."""
        return self.state.plan

    @property
    def read_for(self) -> tuple[Question, ...]:
        """The questions that it was read for, if any."""
        return self.state.read_for

    def grow(self, asking: Asking, prompt: Prompt) -> None:
        """Go on to a longer text, of which this document is the beginning; kept turns are forgotten.

        What was read stays; the rest is read exactly over it. Called by :meth:`apb.Engine.read`.

        Args:
            asking: makes the prompts of the longer text.
            prompt: one of them, as it would be read.

        Raises:
            InputError: the text does not begin with this document, or does not fit.
        """
        state, engine = self.state, self._engine
        self._check_here()
        if self.plan.going_on < self.plan.document:
            raise InputError("A document cannot go on from one that was read with propagation; read it anew.")
        before, after = state.prefix + state.document, prompt.prefix + prompt.document
        same = next((n for n, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before))
        # The last tokens of a text may be others once it goes on.
        if prompt.prefix != state.prefix or min(same, len(after)) < len(before) - SEAM:
            raise InputError(
                "The text does not begin with the document that it is to go on from; read it without after=."
            )
        plan = replace(self.plan, document=len(prompt.document))
        engine.check(plan, after[same:] or after[-1:], 0)
        if engine.turns_otherwise(same, len(after)):
            raise InputError("The model rotates positions of so long a text otherwise; read it without after=.")
        self._end_session()
        self._asking = asking
        same = min(same, len(after))
        state.cache.forget(same)
        self._become(after[:same])
        for start in range(same, len(after), _ROWS):  # whatever happens, it is a document of what has been read
            read = after[start : start + _ROWS]
            _, seconds = engine.read_on(state.cache, read, 0)
            self._become(after[: start + len(read)], seconds)

    def _become(self, tokens: tuple[int, ...], seconds: float = 0.0) -> None:
        """Be the document of these tokens, which are what the cache holds, read for nothing in particular."""
        state = self.state
        document = tokens[len(state.prefix) :]
        tail = state.cache.cut(len(tokens))
        state.cache.keep_windows(len(tokens) - SEAM)
        self.state = replace(
            state,
            plan=replace(state.plan, document=len(document)),
            document=document,
            query=(),
            tail=tail,
            prefill_s=state.prefill_s + seconds,
            kept=(),
            unread=(),
        )

    def save(self, folder: str | Path) -> None:
        """Write the document to a folder, for :meth:`apb.Engine.load`; every rank must call it.

        Raises:
            InputError: the folder cannot be written, on any of the ranks.
        """
        from .store import save

        if not self.state.cache.indices:
            raise RuntimeError("The document was dropped from memory by the keeper it was given to; nothing is left.")
        save(self._engine, self._asking, self.state, Path(folder))

    def copy(self) -> Document:
        """The same document in memory of its own, so that both can be asked at once; this one may be in use."""
        state = self.state
        self._check_here()
        return Document(self._engine, self._asking, replace(state, cache=state.cache.copy(len(self.token_ids), ROOM)))

    def rest(self) -> None:
        """End the last question's session, and forget what was asked."""
        self._end_session()
        self.state.cache.forget(len(self.token_ids))

    def leave(self, copy: HostCopy | None) -> HostCopy:
        """Free the device's memory; keys and values are in host memory until :meth:`come_back`.

        Args:
            copy: an earlier copy of the same tokens, if there is one.

        Returns:
            The copy that they are in.
        """
        state = self.state
        self.rest()
        copy = copy or HostCopy(state.cache)
        copy.replace(state.cache)
        state.cache.move_beside(lambda _: torch.device("cpu"))
        state.tail, state.here = state.tail.to(lambda _: torch.device("cpu")), False
        return copy

    def drop(self) -> None:
        """Free all memory; the document cannot be asked any more."""
        self._end_session()
        self.state.cache.clear()
        self.state.tail, self.state.here = Tail({}, 0), False

    def come_back(self, copy: HostCopy) -> None:
        """Return to the device from a copy; that goes on while the next question is read."""
        state = self.state
        state.cache.move_beside(self._engine.device_of)
        state.tail, state.here = state.tail.to(self._engine.device_of), True
        copy.fetch(state.cache, self._engine.device_of, ROOM)

    @property
    def exact(self) -> bool:
        """True if its keys and values are those of full attention, whatever is asked."""
        return self.plan.exact

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens that stay read: prefix, document, kept turns."""
        return self.state.token_ids

    def read_for_as_seen_from(self, query: Question) -> str:
        """For what the document was read, seen from a question: :data:`THIS`, :data:`ANOTHER` or :data:`NONE`."""
        if not self.read_for:
            return NONE
        return THIS if not self.state.kept and self._asking.query(query) == self.state.query else ANOTHER

    def prefill(self, query: Question, *, max_new_tokens: int = 1) -> Session:
        """Read a question; the session of document and question. It ends when the document is asked again.

        Args:
            query: the question, a text if the document was given as text, else token ids.
            max_new_tokens: tokens to reserve room for after the question.

        Raises:
            InputError: an empty question, or one that does not fit with its answer.
        """
        state = self.state
        tokens = self._asking.turn(state.unread, query) if state.kept else self._asking.query(query)
        return self._after(tokens, max_new_tokens)

    def ask(
        self,
        query: Question,
        *,
        keep: bool = False,
        reread: str = "never",
        cancelled: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> Generation:
        """Answer a question; ``sampling`` as in :class:`apb.generation.Sampling`.

        Args:
            query: as in :meth:`prefill`.
            keep: keep question and answer, so that the next question is a further turn of the conversation.
            reread: "auto": read the text anew for this question, by the engine's strategy, where it was read for
                another one and not exactly, which costs accuracy (docs/documents.md); the document stays as it is.
            cancelled: rank 0's is called before every token; :class:`apb.Cancelled` is raised once it returns True.
            sampling: see above.
        """
        return whole(self._stream(query, Sampling(**sampling), keep, reread, cancelled))

    def stream(
        self,
        query: Question,
        *,
        keep: bool = False,
        reread: str = "never",
        cancelled: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> Generator[str, None, Generation]:
        """As :meth:`ask`, but yield the answer's text in pieces; the generator's return value is the answer."""
        self._engine.needed_tokenizer()
        return self._stream(query, Sampling(**sampling), keep, reread, cancelled)

    def _stream(
        self, query: Question, sampling: Sampling, keep: bool, reread: str, cancelled: Callable[[], bool] | None
    ) -> Generator[str, None, Generation]:
        check_reread(reread)
        if keep and reread != "never":
            raise InputError("A turn is kept over what was read; leave reread out, or do not keep it.")
        seen = self.read_for_as_seen_from(query)
        if reread == "auto" and seen == ANOTHER and not self.exact and not self.state.kept:
            session, seen = self._anew(query, sampling.max_new_tokens), THIS
        else:
            session = self.prefill(query, max_new_tokens=sampling.max_new_tokens)
        answer = yield from self._engine.answering.stream(session, sampling, cancelled)
        answer.read_for = seen
        if keep:
            state = self.state
            state.kept, state.unread = tuple(session.token_ids[self.plan.query_start :]), (answer.token_ids[-1],)
            state.cache = session.cache
        return answer

    def _anew(self, query: Question, max_new_tokens: int) -> Session:
        """The session of the text and a question, read in memory of its own."""
        self._check_here()
        state = self.state
        # The question that it was read for may stand in front.
        first = len(state.query) if self.plan.method.question_first else 0
        prompt = self._asking.anew(state.prefix[: len(state.prefix) - first], state.document, query)
        self._end_session()
        self._session = self._engine.prefill(prompt, max_new_tokens=max_new_tokens)
        return self._session

    def _check_here(self) -> None:
        if not self.state.here:
            raise RuntimeError("The document has left the device; get it from where it is kept again, by its key.")

    def _end_session(self) -> None:
        if self._session is not None:
            self._session.end(
                "The document has been asked another question, or has left the device; this session lasted until then."
            )
            self._session = None

    def _after(self, query: tuple[int, ...], max_new_tokens: int) -> Session:
        """The session after all that is kept and these tokens."""
        engine, state, start = self._engine, self.state, len(self.token_ids)
        if engine.closed:
            raise RuntimeError(CLOSED)
        self._check_here()
        everything = state.kept + query
        prompt = Prompt(state.prefix, state.document, everything, front=state.prefix)
        plan = replace(self.plan, query=len(everything))
        engine.check(plan, query, max_new_tokens)
        if plan.going_on < plan.document and everything != state.query:
            raise InputError(
                "With propagation the upper layers hold only what the question looks at that the document was read "
                "for; read it anew for this one, or without propagation."
            )
        self._end_session()
        state.cache.forget(start)
        state.cache.reserve(len(query) + max_new_tokens)
        if everything == state.query:
            state.cache.restore(state.tail)
            session = engine.session(plan, prompt, state.cache, state.logits, 0.0, max_new_tokens)
        elif engine.turns_otherwise(start, plan.total):
            session = engine.prefill(prompt, max_new_tokens=max_new_tokens)
        else:
            logits, seconds = engine.read_on(state.cache, query, max_new_tokens)
            session = engine.session(plan, prompt, state.cache, logits, seconds, max_new_tokens)
        self._session = session
        return session
