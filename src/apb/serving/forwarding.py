"""Requests that are read here and answered by a vLLM server, from the documents in a folder that both see.

What the folder holds goes straight there; another document is read by the ranks into the folder first. While vLLM
answers, the ranks read for others.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..asking import THIS
from ..errors import InputError
from ..generation import Generation, Sampling, Scored
from ..integrations.lookup import NEVER, Lookup, Stored, same_model
from ..prompt import Prompt
from ..reading import Reading
from .answers import Answer, Cancellable, Event, Task, Written
from .storing import HandedOver
from .vllm_server import Exchange, VllmServer, cached, failed, parameters, scored

# Shorter prompts vLLM reads as fast as they are handed over.
SHORTEST_STORED = 1024
# Requests that vLLM has at a time, each on a thread of its own here; further ones are refused.
MOST_FORWARDED = 256

Tell = Callable[[Event], None]
# Takes a request; None if there are too many.
Submit = Callable[[Task, Tell], Awaitable[Cancellable | None]]


@dataclass(frozen=True)
class Ours:
    """Which documents of the folder this server may hand over: those of its model, and exact ones alone if it is."""

    model: str
    dtype: str
    exact: bool

    def unfit(self, stored: Stored) -> str | None:
        """Why a document is another's; None if it is not."""
        manifest = stored.manifest
        same = same_model(manifest["model"]["name"], self.model) and manifest["dtype"] == self.dtype
        return None if same and stored.whole else f"The document in {str(stored.folder)!r} is of another model."


class Forwarding:
    """Takes requests instead of the ranks, which read for it.

    Args:
        submit: has the ranks read; see :meth:`apb.serving.ranks.Ranks.submit`.
        server: answers.
        folder: the documents.
        ours: which of them may be used.
        reading: how prompts are read.
    """

    def __init__(self, submit: Submit, server: VllmServer, folder: Path, ours: Ours, reading: Reading) -> None:
        self._submit, self._server, self._folder, self._reading = submit, server, folder, reading
        self._allowance = NEVER if ours.exact else THIS
        self._lookup = Lookup(folder, ours.unfit, lambda sentence: None)
        self._looking, self._counting = threading.Lock(), threading.Lock()
        self._answering = 0

    @property
    def answering(self) -> int:
        """Number of requests that the vLLM server is answering."""
        return self._answering

    async def submit(self, task: Task, tell: Tell) -> Cancellable | None:
        """Take a request; one without answers is read only. None if there are too many.

        Raises:
            InputError: it can never be answered.
        """
        read = Task(task.prompt, answers=0, store=str(self._folder))
        if not task.answers:
            return await self._submit(read, tell)
        sampling, prompt = Sampling(**task.sampling), self._reading.arranged(task.prompt)
        request = Forwarded(self._server, sampling, task.answers, tell, self._count)
        if len(prompt) + sampling.max_new_tokens > self._server.positions:
            raise InputError(
                f"The prompt has {len(prompt):,} tokens and its answer up to {sampling.max_new_tokens:,}, and the vLLM "
                f"server that answers takes {self._server.positions:,} together; send a shorter text or ask for less."
            )
        if self._answering >= MOST_FORWARDED:
            return None
        if task.ordinary or len(prompt) < SHORTEST_STORED:
            request.go_on(HandedOver((task.prompt if task.ordinary else prompt).token_ids))
        elif (there := await asyncio.to_thread(self._stored, prompt)) is not None:
            request.go_on(there)
        else:
            request.reading = await self._submit(read, request.heard)
            return None if request.reading is None else request
        return request

    def _stored(self, prompt: Prompt) -> HandedOver | None:
        """What the folder holds of a prompt, if that is its document."""
        with self._looking:
            found, _ = self._lookup.find(prompt.token_ids, self._allowance)
        if found is None or found.tokens < len(prompt) - len(prompt.query):
            return None
        return HandedOver.of_stored(prompt.token_ids, found)

    def _count(self, more: int) -> None:
        with self._counting:
            self._answering += more


@dataclass
class _Said:
    """An answer so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    reason: str | None = None


class Forwarded:
    """One request.

    Attributes:
        reading: the ranks' part, if they have one.
    """

    def __init__(
        self, server: VllmServer, sampling: Sampling, answers: int, tell: Tell, count: Callable[[int], None]
    ) -> None:
        self.reading: Cancellable | None = None
        self._server, self._sampling, self._answers, self._tell, self._count = server, sampling, answers, tell, count
        self._asked = parameters(sampling)
        self._handed: HandedOver | None = None
        self._exchange: Exchange | None = None
        self._cancelled = False

    def heard(self, event: Event) -> None:
        """Take an event of the reading."""
        if isinstance(event, HandedOver):
            self._handed = event
        elif event is None:
            assert self._handed is not None, "a reading ends with it, or with an error"
            self.go_on(self._handed)
        else:
            self._tell(event)

    def go_on(self, handed: HandedOver) -> None:
        """Have vLLM answer, on a thread."""
        self._count(1)
        threading.Thread(target=self._run, args=(handed,), daemon=True).start()

    def cancel(self) -> None:
        """End the request, here and there."""
        self._cancelled = True
        if self.reading is not None:
            self.reading.cancel()
        if self._exchange is not None:
            self._exchange.cancel()

    def _run(self, handed: HandedOver) -> None:
        end: Event = None
        try:
            self._answer(handed)
        except Exception as error:
            end = error
        finally:
            self._count(-1)
        self._tell(end)

    def _answer(self, handed: HandedOver) -> None:
        # The most likely tokens are the same every time, and vLLM writes them once.
        several = self._answers if self._sampling.draws else 1
        said = [_Said() for _ in range(several)]
        took: int | None = None
        start, first = time.perf_counter(), 0.0
        self._exchange = self._server.ask(handed.token_ids, {**self._asked, "n": several})
        if self._cancelled:
            self._exchange.cancel()
        with self._exchange as exchange:
            for choices, usage in exchange.pieces():
                first = first or time.perf_counter() - start
                for choice in choices:
                    self._take(choice, said[choice["index"]])
                took = cached(usage) if usage else took
        total = time.perf_counter() - start
        for index in range(self._answers):
            one = said[index % several]
            if one.reason not in ("stop", "length"):
                raise failed(self._server.url, f"it ended an answer for another reason, {one.reason}")
            if index >= several:
                self._tell(Written(index, one.text, tuple(one.scored)))
            self._tell(Answer(index, self._result(handed, one, took, first, total - first)))

    def _take(self, choice: dict[str, Any], said: _Said) -> None:
        """A piece of an answer."""
        scores = scored(choice.get("logprobs"), self._sampling.top_logprobs)
        said.text += choice["text"]
        said.token_ids += choice.get("token_ids") or ()
        said.scored += scores
        said.reason = choice.get("finish_reason") or said.reason
        if choice["text"] or scores:
            self._tell(Written(choice["index"], choice["text"], tuple(scores)))

    def _result(self, handed: HandedOver, said: _Said, took: int | None, first_s: float, rest_s: float) -> Generation:
        needed = min(handed.tokens, len(handed.token_ids) - 1)  # vLLM always computes the last one
        notes = [] if handed.problem is None else [f"{handed.problem} The vLLM server has read all of it by itself."]
        if took is None and needed:
            notes.append("The vLLM server does not say whether it took the document from the store.")
        elif took is not None and took < needed:
            notes.append(f"The vLLM server found {took:,} of {needed:,} stored tokens, and read the others by itself.")
            if not handed.exact:  # it takes all of such a document, or none of it
                handed = replace(handed, strategy="full", exact=True, read_for=None, plan={}, choice=None)
        rate = (len(said.token_ids) - 1) / rest_s if rest_s else 0.0
        return Generation(
            text=said.text,
            token_ids=said.token_ids,
            finish_reason=str(said.reason),
            strategy=handed.strategy,
            exact=handed.exact,
            plan=handed.plan,
            timing={
                "prefill_s": handed.reading_s,
                "storing_s": handed.storing_s,
                "first_token_s": first_s,
                "decode_s": rest_s,
                "decode_tokens_per_s": rate,
            },
            memory={},
            fingerprint={},
            decode={"method": "vllm", "exact": True, "share": 1.0},
            prompt_tokens=len(handed.token_ids),
            choice=handed.choice,
            read_for=handed.read_for,
            scored=said.scored,
            notes=notes,
        )
