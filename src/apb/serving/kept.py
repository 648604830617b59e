"""What has been read and stays: later requests on the same text, or on one that begins with it, read only the rest."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..asking import OfTokens
from ..document import Document
from ..engine import Engine
from ..errors import InputError
from ..hf.identity import fingerprint
from ..manifest import MANIFEST, manifest_of
from ..prompt import Prompt
from ..session import Session
from ..state import State
from ..store import tokens_hash
from ..tiers import Documents
from .answers import Passed
from .messages import KeptFigures
from .passing import Passing

# Tokens after a document that are read in one pass; a text that goes on for longer is read anew.
LONGEST_REST = 8192
# Shorter texts are read again as fast.
SHORTEST_KEPT = 1024

Tokens = tuple[int, ...]
Opened = tuple[Session, str | None, Callable[[], None]]
# Of a document that was read before the server was started.
_UNKNOWN = Passed(None)


@dataclass(frozen=True)
class Places:
    """Where documents may stay beside the device.

    Attributes:
        host_bytes: of every rank, in host memory.
        folder: for those on disk; what is there is found again.
        disk_bytes: of all files there.
    """

    host_bytes: int = 0
    folder: str | None = None
    disk_bytes: int = 0


class KeptDocuments:
    """Documents by the tokens they begin with, on one rank. All ranks make the same calls in the same order.

    Attributes:
        room: bytes that documents may take on the device of the fullest rank.
        told: what is said of them; another thread may look.
    """

    def __init__(self, engine: Engine, room: int, places: Places) -> None:
        self._engine = engine
        self._leads = engine.mesh.everyone.rank == 0
        # Ranks may find different amounts of memory free, and must decide alike.
        bounds = torch.tensor([room, places.host_bytes, places.disk_bytes], device=engine.device)
        self.room, host, disk = engine.mesh.everyone.all_gather(bounds).wait().amin(0).tolist()
        folder = None if places.folder is None else Path(places.folder) / _reading(engine)
        self._lengths = dict(self._found(folder)) if folder is not None else {}
        self.documents = Documents(engine, self.room, host, folder, disk)
        self._passed: dict[str, Passed] = {}
        self._hits = 0
        self.told = KeptFigures()
        self._tell()

    def clear(self) -> None:
        """Have the device free of all documents that no request is using."""
        self.documents.make_room(self.room)
        self._tell()

    def write(self) -> None:
        """Write a document to disk that is not there yet."""
        self.documents.write()
        self._tell()

    def read_of(self, prompt: Prompt) -> int:
        """How many tokens of a prompt have been read already."""
        known = self._longest(self._engine.reading.arranged(prompt).token_ids)
        return 0 if known is None else known[1]

    def open(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        progress: Callable[[int, int], None],
        between: Callable[[], None],
    ) -> tuple[Session, Passed, Callable[[], None]]:
        """The session of a prompt, what its document passed on and for which question, and what to call after use.

        Of a document that is in use a copy is used, since each keeps the rows of one question at a time.
        """
        arranged = self._engine.reading.arranged(prompt)
        tokens = arranged.token_ids
        text = len(arranged.prefix), len(arranged.prefix) + len(arranged.document)
        while (known := self._longest(tokens)) is not None:
            key, length = known
            try:
                used = self.documents.held(key)
                document = self.documents.document(key)
            except InputError as error:
                self._forget(key, error)
                continue
            self._hits += 1
            asked = document.copy() if used else document
            if not used:
                self.documents.hold(key)
            session, read_for, close = self._asked(asked, tokens[length:], max_new_tokens, None if used else key)
            return session, self._passed.get(key, _UNKNOWN).within(*text, read_for), close
        plan = self._engine.plan(prompt, max_new_tokens)
        _, size, _ = self._engine.demand(plan, max_new_tokens)
        passing = Passing(plan)
        session = self._engine.prefill(
            prompt, max_new_tokens=max_new_tokens, progress=progress, between=between, on_selection=passing.seen
        )
        passed = passing.found(self._engine, session)
        once = plan.going_on < plan.document  # with propagation it answers this question alone
        if once or plan.query_start < SHORTEST_KEPT or size > self.room:
            return session, passed.within(*text, None), lambda: None
        seconds, asking = session.timing["prefill_s"], OfTokens(arranged.prefix, arranged.document)
        state = State.of_session(session, arranged, (arranged.query,), self._engine.reading.compressor.name)
        document = Document(self._engine, asking, state)
        session, read_for, close = self._added(document, arranged.query, max_new_tokens, passed)
        session.timing["prefill_s"] = seconds
        return session, passed.within(*text, read_for), close

    def _added(self, document: Document, query: Tokens, max_new_tokens: int, passed: Passed) -> Opened:
        """Keep a document that was read, if it can be, and ask it."""
        key: str | None = tokens_hash(document.token_ids)
        assert key is not None
        if key in self.documents:  # another request has read it meanwhile
            return self._asked(document, query, max_new_tokens, None)
        try:
            self.documents.add(key, document)
        except InputError:  # larger than was predicted
            key = None
        else:
            self._lengths[key], self._passed[key] = len(document.token_ids), passed
            self.documents.hold(key)
        return self._asked(document, query, max_new_tokens, key)

    def _asked(self, document: Document, query: Tokens, max_new_tokens: int, key: str | None) -> Opened:
        """Ask a document, which is held under a key if it has one."""

        def close() -> None:
            if key is not None:
                self.documents.hold(key, False)

        self._tell()
        try:
            read_for = document.read_for_as_seen_from(query)
            return document.prefill(query, max_new_tokens=max_new_tokens), read_for, close
        except BaseException:
            close()
            raise

    def _longest(self, tokens: Tokens) -> tuple[str, int] | None:
        """Key and length of the longest document at the beginning of these tokens that leaves little to read."""
        self._lengths = {key: length for key, length in self._lengths.items() if key in self.documents}
        self._passed = {key: passed for key, passed in self._passed.items() if key in self._lengths}
        least = max(len(tokens) - LONGEST_REST, 1)
        lengths = sorted({length for length in self._lengths.values() if least <= length < len(tokens)})
        found = [(key, length) for key, length in _hashes(tokens, lengths) if self._lengths.get(key) == length]
        return found[-1] if found else None

    def _forget(self, key: str, error: InputError) -> None:
        if self._leads:
            print(f"apb: a document is read anew. {error}", file=sys.stderr, flush=True)
        self.documents.forget(key)

    def _found(self, folder: Path) -> Iterator[tuple[str, int]]:
        """Keys and lengths of the documents in a folder; what is none that can be read is removed."""
        wrong = []
        for path in sorted(folder.glob(f"*/{MANIFEST}")):
            try:
                manifest = manifest_of(path.parent)
                yield str(manifest["tokens_sha256"]), int(manifest["tokens"])
            except (InputError, KeyError) as error:
                wrong.append((path.parent, error))
        everyone = self._engine.mesh.everyone
        everyone.barrier()
        for path, reason in wrong if self._leads else ():
            print(f"apb: a document is dropped. {reason}", file=sys.stderr, flush=True)
            shutil.rmtree(path)
        everyone.barrier()

    def _tell(self) -> None:
        self.told = KeptFigures(len(self._lengths), self._hits, self.documents.bytes())


def _hashes(tokens: Tokens, lengths: list[int]) -> Iterator[tuple[str, int]]:
    """:func:`apb.store.tokens_hash` of the first so many tokens, for lengths in ascending order, in one pass."""
    digest, done = hashlib.sha256(), 0
    for length in lengths:
        text = ",".join(map(str, tokens[done:length]))
        digest.update(f"{',' if done else ''}{text}".encode())
        done = length
        yield digest.hexdigest(), length


def _reading(engine: Engine) -> str:
    """A folder's name for this model read in this way: what is read otherwise is something else."""
    reading = engine.reading
    how = (reading.methods, reading.compressor, reading.rounds, reading.automatic, engine.dtype)
    return f"{fingerprint(engine.model)}-{hashlib.sha256(repr(how).encode()).hexdigest()[:8]}"
