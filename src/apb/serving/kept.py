"""What has been read and stays: later requests on the same text, or on one that begins with it, read only the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ..asking import OfTokens
from ..document import Document, State
from ..engine import Engine
from ..prompt import Prompt
from ..session import Session

# Tokens after a document that are read in one pass; a text that goes on for longer is read anew.
LONGEST_REST = 8192
# Shorter texts are read again as fast.
SHORTEST_KEPT = 1024

Tokens = tuple[int, ...]


@dataclass
class _Entry:
    document: Document
    size: int
    busy: bool = False


class KeptDocuments:
    """Documents of one rank. All ranks make the same calls in the same order, and keep the same documents.

    Attributes:
        room: bytes that documents may take on the fullest rank; the least recently used are forgotten beyond.
        hits: requests that found their document here.
    """

    def __init__(self, engine: Engine, room: int) -> None:
        self.room = room
        self.hits = 0
        self._engine = engine
        self._kept: OrderedDict[Tokens, _Entry] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes on the fullest rank, as predicted."""
        return sum(kept.size for kept in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all documents that no request is using."""
        for tokens in [tokens for tokens, kept in self._kept.items() if not kept.busy]:
            del self._kept[tokens]

    def open(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        progress: Callable[[int, int], None],
        between: Callable[[], None],
    ) -> tuple[Session, str | None, Callable[[], None]]:
        """The session of a prompt, for which question its document was read, and what to call after use.

        A document that is in use is not found; its text is read anew.
        """
        engine = self._engine
        arranged = engine.reading.arranged(prompt)
        everything = arranged.token_ids
        found = self._longest(everything)
        if found is not None:
            kept, tokens = self._kept[found], everything[len(found) :]
            self._kept.move_to_end(found)
            self.hits += 1
            kept.busy = True
            try:
                read_for = kept.document.read_for_as_seen_from(tokens)
                session = kept.document.prefill(tokens, max_new_tokens=max_new_tokens)
            except BaseException:
                kept.busy = False
                raise
            return session, read_for, lambda: self._close(found, kept)
        plan = engine.plan(prompt, max_new_tokens)
        _, size, _ = engine.demand(plan, max_new_tokens)
        session = engine.prefill(prompt, max_new_tokens=max_new_tokens, progress=progress, between=between)
        once = plan.going_on < plan.document  # with propagation it answers this question alone
        if once or plan.query_start < SHORTEST_KEPT or size > self.room:
            return session, None, lambda: None
        seconds, asking = session.timing["prefill_s"], OfTokens(arranged.prefix, arranged.document)
        state = State.of_session(session, arranged, (arranged.query,), engine.reading.compressor.name)
        kept = _Entry(Document(engine, asking, state), size, busy=True)
        tokens = everything[: plan.query_start]
        self._kept[tokens] = kept
        self._shrink()
        session = kept.document.prefill(arranged.query, max_new_tokens=max_new_tokens)
        session.timing["prefill_s"] = seconds
        return session, kept.document.read_for_as_seen_from(arranged.query), lambda: self._close(tokens, kept)

    def _longest(self, tokens: Tokens) -> Tokens | None:
        """The longest document at the beginning of these tokens that is not in use and leaves little to read."""
        return max(
            (
                known
                for known, kept in self._kept.items()
                if not kept.busy and 0 < len(tokens) - len(known) <= LONGEST_REST and tokens[: len(known)] == known
            ),
            key=len,
            default=None,
        )

    def _close(self, tokens: Tokens, kept: _Entry) -> None:
        kept.busy = False
        self._shrink()

    def _shrink(self) -> None:
        idle = [tokens for tokens, kept in self._kept.items() if not kept.busy]
        while idle and self.size > self.room:
            del self._kept[idle.pop(0)]
