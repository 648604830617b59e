"""Documents in a store, looked up by the token ids that a prompt begins with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..asking import ANOTHER, NONE, THIS
from ..errors import InputError, first_line
from ..manifest import MANIFEST, manifest_of
from .tensors import TensorFile

Ids = NDArray[np.int64]

NEVER = "never"
ALLOWANCES = (NEVER, THIS, NONE, ANOTHER)
"""For which question an approximate document may have been read, if it is to serve; each allows those before it."""


class Stored:
    """One document of a store, opened.

    Attributes:
        folder: where it is.
        manifest: what is written about it.
        tokens: ids of its tokens: prefix, document, kept turns.
        question: ids of what it was read for, whose keys and values stand behind them; empty where turns were kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = manifest_of(folder)
        self.paths = [folder / Path(shard["file"]).name for shard in self.manifest["shards"]]
        self.sizes = [int(shard["bytes"]) for shard in self.manifest["shards"]]
        self.exact = bool(self.manifest["exact"])
        if not self.there():
            raise OSError("files are missing or cut short")
        last = TensorFile(self.paths[-1])
        parts = {name: last.whole(name).numpy() for name in ("prefix", "document", "kept", "query")}
        self.tokens: Ids = np.concatenate([parts["prefix"], parts["document"], parts["kept"]])
        self.question: Ids = parts["query"] if not len(parts["kept"]) else parts["query"][:0]

    def there(self) -> bool:
        """True if the files of keys and values are, whole."""
        try:
            return all(path.stat().st_size == size for path, size in zip(self.paths, self.sizes, strict=True))
        except OSError:
            return False

    @cached_property
    def key(self) -> str:
        """What tells it from all other documents and readings of them."""
        shards = [shard["sha256"] for shard in self.manifest["shards"]]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]

    @cached_property
    def shape(self) -> dict[int, tuple[int, int]]:
        """(kv_heads, head_dim) of every layer."""
        file, names = TensorFile(self.paths[0]), {}
        for layer in json.loads(file.metadata["positions"]):
            heads, _, width = file.shape(f"{layer}.keys")
            names[int(layer)] = heads, width
        return names

    @cached_property
    def whole(self) -> bool:
        """True if every layer holds every token."""
        held: dict[str, int] = {}
        for path in self.paths:
            for layer, runs in json.loads(TensorFile(path).metadata["positions"]).items():
                held[layer] = held.get(layer, 0) + sum(stop - start for start, stop in runs)
        return all(count == len(self.tokens) for count in held.values())

    def seen_from(self, rest: Ids) -> str:
        """For which question it was read, seen from what stands behind it in a prompt."""
        if not self.manifest["read_for"]:
            return NONE
        return THIS if len(self.question) and np.array_equal(rest, self.question) else ANOTHER


@dataclass(frozen=True)
class Found:
    """A document that a prompt begins with.

    Attributes:
        document: the document.
        tokens: how many of the prompt's tokens it has keys and values of, from the first one on.
        read_for: as in :meth:`Stored.seen_from`.
    """

    document: Stored
    tokens: int
    read_for: str

    def to_dict(self) -> dict[str, Any]:
        """What is told to who asked."""
        manifest = self.document.manifest
        return {
            "document": self.document.folder.name,
            "document_tokens": self.tokens,
            "strategy": manifest["strategy"],
            "exact": self.document.exact,
            "read_for": self.read_for,
        }


class Lookup:
    """The documents of one model in a store.

    Args:
        folder: the store: a folder of documents, or one document.
        unfit: says why a document cannot be used, in a sentence; None if it can.
        tell: called once with a sentence about every document that is left out.
    """

    def __init__(self, folder: Path, unfit: Callable[[Stored], str | None], tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._unfit = unfit
        self._tell = tell
        self._known: dict[Path, tuple[tuple[int, int], Stored | None]] = {}

    def documents(self) -> list[Stored]:
        """Those that are there now and fit."""
        found: dict[Path, tuple[tuple[int, int], Stored | None]] = {}
        paths = [self._folder / MANIFEST, *sorted(self._folder.glob(f"*/{MANIFEST}"))]
        for path in paths:
            try:
                stat = path.stat()
            except OSError:  # not there, or not any more
                continue
            stamp = stat.st_mtime_ns, stat.st_ino
            known = self._known.get(path)
            found[path] = known if known is not None and known[0] == stamp else (stamp, self._opened(path.parent))
        self._known = found
        return [stored for _, stored in found.values() if stored is not None]

    def _opened(self, folder: Path) -> Stored | None:
        try:
            stored = Stored(folder)
            problem = self._unfit(stored)
        except InputError as error:
            problem = str(error)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"The document in {str(folder)!r} cannot be read: {first_line(error)}."
        if problem is None:
            return stored
        self._tell(problem)
        return None

    def find(self, prompt: Sequence[int], allowance: str) -> tuple[Found | None, Found | None]:
        """The document by which most of a prompt need not be read again, and the best one that is not allowed.

        An exact document serves as far as the prompt goes with it. An approximate one serves whole or not at all, and
        only if it was read for a question that ``allowance``, one of :data:`ALLOWANCES`, allows; with its own question
        it has the prompt's every token. Where both would serve as well, the exact one does.
        """
        ids = np.asarray(prompt, dtype=np.int64)
        best: tuple[tuple[int, bool], Found] | None = None
        refused: Found | None = None
        for stored in self.documents():
            tokens = stored.tokens
            if stored.exact:
                every = np.concatenate([tokens, stored.question])
                found = Found(stored, common(ids, every), stored.seen_from(ids[len(tokens) :]))
                worth = found.tokens, True
            else:
                if common(ids, tokens) < len(tokens) or len(ids) == len(tokens):
                    continue
                seen = stored.seen_from(ids[len(tokens) :])
                found = Found(stored, len(ids) if seen == THIS else len(tokens), seen)
                worth = len(tokens), False
                if ALLOWANCES.index(seen) > ALLOWANCES.index(allowance):
                    if refused is None or refused.tokens < found.tokens:
                        refused = found
                    continue
            if found.tokens and (best is None or worth > best[0]):
                best = worth, found
        return (None if best is None else best[1]), refused


def common(one: Ids, other: Ids) -> int:
    """Length of the beginning that two have in common."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def same_model(one: str, other: str) -> bool:
    """True if two names, each a folder or a hub id, are of the same model."""
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))
