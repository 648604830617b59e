"""``apb serve --answer-with URL``: this server reads, and a vLLM server at that address answers from what it stored."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..asking import THIS, OfTokens
from ..document import Document, State
from ..engine import Engine
from ..errors import Cancelled, InputError
from ..generation import Generation
from ..hardware import fingerprint as machine
from ..hf.identity import fingerprint
from ..integrations.shelf import NEVER, Found, Shelf, Stored
from ..planning.plan import Plan
from ..prompt import Prompt
from .worker import Job, Progress, Worker

# Seconds until a server that says nothing counts as gone: a long prompt may be computed there before the first token.
_PATIENCE_S = 600.0


class Unanswered(RuntimeError):
    """The server that answers did not."""


class Answerer:
    """A vLLM server.

    Args:
        url: its address, ``http://HOST:PORT``.

    Raises:
        InputError: nothing answers there.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            with self._open("/v1/models", None) as reply:
                self.model = str(json.load(reply)["data"][0]["id"])
        except (OSError, ValueError, LookupError, Unanswered) as error:
            raise InputError(
                f"No vLLM server answers at {url}: {error}; start one there, or leave --answer-with out."
            ) from error

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=_PATIENCE_S)
        except urllib.error.HTTPError as error:
            told = error.read(2000).decode(errors="replace")
            raise Unanswered(f"{self.url} refused the request with status {error.code}: {told}") from error

    def stream(self, token_ids: tuple[int, ...], sampling: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The choices of a streamed completion, as they come: ``text``, ``token_ids``, ``finish_reason``.

        Raises:
            Unanswered: the server refused, or ended without an answer.
        """
        asked = {
            "max_tokens": sampling["max_new_tokens"],
            "temperature": sampling["temperature"],
            # What is left out would be the checkpoint's.
            "top_p": 1.0 if sampling["top_p"] is None else sampling["top_p"],
            "top_k": -1 if sampling["top_k"] is None else sampling["top_k"],
            "seed": sampling["seed"],
        }
        body = {"model": self.model, "prompt": list(token_ids), "stream": True, "return_token_ids": True, **asked}
        try:
            with self._open("/v1/completions", body) as reply:
                for line in reply:
                    said = line.decode().strip().removeprefix("data:").strip()
                    if said == "[DONE]":
                        return
                    event = json.loads(said) if said and not said.startswith(":") else {}
                    if "error" in event:
                        raise Unanswered(f"{self.url} failed: {event['error'].get('message')}")
                    yield from event.get("choices", ())
        except (OSError, ValueError) as error:
            raise Unanswered(f"The answer of {self.url} broke off: {error}") from error


class Handing(Worker):
    """Reads prompts one at a time into a store that both servers see; answers to them are passed on side by side.

    Args:
        engine: what reads.
        url: address of the vLLM server.
        store: the folder of documents.
    """

    def __init__(self, engine: Engine, url: str, store: Path) -> None:
        super().__init__(engine)
        self._store = store
        self._answerer = Answerer(url) if self._everyone.rank == 0 else None
        self._model = fingerprint(engine.model)
        self._shelf = Shelf(store, self._unfit, lambda sentence: None)

    def _unfit(self, stored: Stored) -> str | None:
        same = stored.manifest["model"]["fingerprint"] == self._model
        same = same and stored.manifest["dtype"] == str(self.engine.dtype).removeprefix("torch.")
        return None if same and stored.whole else f"{str(stored.folder)!r} is of another model."

    def _answer(self, prompt: Prompt, sampling: dict[str, Any], job: Job | None) -> None:
        tell: Callable[[Any], None] = job.tell if job else lambda event: None
        try:
            plan = self.engine.plan(prompt, sampling["max_new_tokens"])
            arranged = self.engine.reading.arranged(prompt)
            found = self._stored(plan, arranged) if job else None
            missing = torch.tensor([int(found is None)], device=self.engine.device)
            start = time.perf_counter()
            if self._everyone.broadcast(missing).item():
                self._read(prompt, arranged, job)
            read_s = time.perf_counter() - start
        except Exception as error:
            tell(error)
            if self._everyone.size > 1 and not isinstance(error, (Cancelled, InputError)):
                raise  # the ranks are out of step by now
            return
        if job is not None:
            passing = (plan, arranged.token_ids, sampling, job, found, read_s)
            threading.Thread(target=self._pass_on, args=passing, daemon=True).start()

    def _stored(self, plan: Plan, arranged: Prompt) -> Found | None:
        """The document of a prompt, if the store has it."""
        found, _ = self._shelf.find(arranged.token_ids, NEVER if plan.exact else THIS)
        needed = len(arranged.prefix) + len(arranged.document)
        return found if found is not None and found.tokens >= needed else None

    def _read(self, prompt: Prompt, arranged: Prompt, job: Job | None) -> None:
        engine = self.engine
        session = engine.prefill(
            prompt,
            progress=None if job is None else lambda done, total: job.tell(Progress(done, total)),
            cancelled=job.cancelled.is_set if job else lambda: False,
        )
        state = State.of_session(session, arranged, (arranged.query,), engine.reading.compressor.name)
        what = [arranged.token_ids, asdict(session.plan.method), session.plan.strategy, self._model]
        name = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
        Document(engine, OfTokens(arranged.prefix, arranged.document), state).save(self._store / name)

    def _pass_on(
        self,
        plan: Plan,
        token_ids: tuple[int, ...],
        sampling: dict[str, Any],
        job: Job,
        found: Found | None,
        read_s: float,
    ) -> None:
        """Have the other server answer, on a thread of the request's own."""
        assert self._answerer is not None, "rank 0 has one"
        text, said, reason, start = "", list[int](), "length", time.perf_counter()
        try:
            for choice in self._answerer.stream(token_ids, sampling):
                if job.cancelled.is_set():
                    raise Cancelled("The answer was cancelled.")
                text += choice["text"]
                said += choice.get("token_ids") or ()
                reason = choice.get("finish_reason") or reason
                if choice["text"]:
                    job.tell(choice["text"])
        except Exception as error:
            job.tell(error)
            return
        seconds = time.perf_counter() - start
        job.tell(
            Generation(
                text=text,
                token_ids=said,
                finish_reason=reason,
                strategy=found.document.manifest["strategy"] if found else plan.strategy,
                exact=found.document.exact if found else plan.exact,
                plan=plan.to_dict(),
                timing={
                    "prefill_s": read_s,
                    "decode_s": seconds,
                    "decode_tokens_per_s": len(said) / seconds if seconds else 0.0,
                },
                memory={},
                fingerprint=machine(self.engine.device, self.engine.dtype),
                decode={"method": "vllm", "exact": True, "share": 1.0},
                prompt_tokens=len(token_ids),
                choice=plan.reason,
                read_for=found.read_for if found else THIS,
                notes=[f"The answer is that of the vLLM server at {self._answerer.url}."],
            )
        )
