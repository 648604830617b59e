"""A prompt's document, read into a folder where another server finds it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..asking import THIS, OfTokens
from ..document import Document, State
from ..errors import InputError
from ..hf.identity import fingerprint
from ..integrations.lookup import Found, Stored
from ..prompt import Prompt

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass(frozen=True)
class HandedOver:
    """What another server finds of a prompt.

    Attributes:
        token_ids: the prompt, as it is to be answered.
        tokens: how many of them stand in the store, from the first one on.
        strategy, exact, read_for: how they were read, as answers have it.
        reading_s, storing_s: seconds that took this time.
        plan, choice: how they were read this time, as answers have it; empty if they were there.
        problem: why they are not there, in a sentence.
    """

    token_ids: tuple[int, ...]
    tokens: int = 0
    strategy: str = "full"
    exact: bool = True
    read_for: str | None = None
    reading_s: float = 0.0
    storing_s: float = 0.0
    plan: dict[str, Any] = field(default_factory=dict)
    choice: str | None = None
    problem: str | None = None

    @classmethod
    def of_stored(cls, token_ids: tuple[int, ...], found: Found) -> HandedOver:
        """What a lookup has found."""
        manifest = found.document.manifest
        return cls(token_ids, found.tokens, manifest["strategy"], found.document.exact, found.read_for)


def read_into(
    folder: Path,
    engine: Engine,
    prompt: Prompt,
    progress: Callable[[int, int], None],
    between: Callable[[], None],
) -> HandedOver:
    """Have a prompt's document in a folder: one that was read for its question, if it is not exact.

    Every rank calls it. Another request may have put it there a moment ago.

    Args:
        folder: the store.
        engine, prompt: what reads what.
        progress, between: as in :meth:`apb.Engine.prefill`; nothing comes between while files are written.
    """
    plan, arranged, everyone = engine.plan(prompt, 1), engine.reading.arranged(prompt), engine.mesh.everyone
    ids = arranged.token_ids
    read = ids[: plan.query_start] if plan.exact else ids
    what = [read, plan.strategy, asdict(plan.method), fingerprint(engine.model), str(engine.dtype)]
    path = folder / hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:24]
    there = torch.tensor([int(_is_there(path))], device=engine.device)
    reading_s = storing_s = 0.0
    problem = None
    if not everyone.broadcast(there).item():
        session = engine.prefill(prompt, progress=progress, between=between)
        reading_s, start = session.timing["prefill_s"], time.perf_counter()
        state = State.of_session(session, arranged, (arranged.query,), engine.reading.compressor.name)
        try:
            Document(engine, OfTokens(arranged.prefix, arranged.document), state).save(path)
        except InputError as error:  # the other server can still read it by itself
            problem = str(error)
        storing_s = time.perf_counter() - start
    return HandedOver(
        token_ids=ids,
        tokens=0 if problem else len(read),
        strategy=plan.strategy,
        exact=plan.exact,
        read_for=THIS,
        reading_s=reading_s,
        storing_s=storing_s,
        plan=plan.to_dict(),
        choice=plan.reason,
        problem=problem,
    )


def _is_there(path: Path) -> bool:
    try:
        Stored(path)
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return False
    return True
