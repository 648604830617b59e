"""Tokenizing beside the event loop: short texts on threads, long ones in processes that do not share Python's lock."""

from __future__ import annotations

import asyncio
import copy
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from ..errors import InputError, unexpected
from .prompts import Asked, Said, asked, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Each with a tokenizer of its own, which are not thread-safe.
_THREADS = 4
# Processes for long texts, each started when it is first needed, in seconds.
_PROCESSES = 2
# Characters of a long text: a shorter one keeps Python's lock for some 10 ms.
LONG = 1 << 17

# What is done with a text: a function of the tokenizer and of these arguments.
Work = tuple[Callable[..., Asked], tuple[Any, ...]]


class Tokenizing:
    """Makes prompts of requests, whose texts together have at most ``characters``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, characters: int) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template
        self._characters = characters
        self._own = threading.local()
        self._copying = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "tokenizing")
        self._others = [Other(tokenizer) for _ in range(_PROCESSES)]
        self._idle: asyncio.Queue[Other] = asyncio.Queue()
        for other in self._others:
            self._idle.put_nowait(other)
        # Code that came with a checkpoint is not found by a new process.
        self._travels = type(tokenizer).__module__.startswith("transformers.")

    async def chat(self, said: Sequence[Said], document: str | None) -> Asked:
        """The prompt of a chat; see :func:`apb.serving.prompts.asked`."""
        characters = sum(len(each.text) for each in said) + len(document or "")
        return await self._made((asked, (said, document, self._template)), characters)

    async def plain(self, text: str) -> Asked:
        """The prompt of a text; see :func:`apb.serving.prompts.plain`."""
        return await self._made((plain, (text,)), len(text))

    def name(self, token: int) -> str:
        """The text of one token."""
        with self._copying:
            return str(self._tokenizer.decode([token]))

    def close(self) -> None:
        """End the processes."""
        for other in self._others:
            other.close()

    async def _made(self, work: Work, characters: int) -> Asked:
        if characters > self._characters:
            raise InputError(
                f"The texts of this request have {characters:,} characters, and at most {self._characters:,} are "
                "read; send a shorter text."
            )
        if characters < LONG or not self._travels:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._here, work)
        other = await self._idle.get()
        try:
            return await asyncio.to_thread(other.made, work)
        finally:
            self._idle.put_nowait(other)

    def _here(self, work: Work) -> Asked:
        if not hasattr(self._own, "tokenizer"):
            with self._copying:
                self._own.tokenizer = copy.deepcopy(self._tokenizer)
        make, given = work
        return make(self._own.tokenizer, *given)


class Other:
    """A process that tokenizes, one text at a time; if it dies, that text has failed, and the next one starts another.

    It ends with this process, however that ends: nobody is at the other end of its pipe then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def made(self, work: Work) -> Asked:
        """The prompt of a text; RuntimeError if the process died over it."""
        with self._lock:
            try:
                if self._process is None or self._pipe is None or not self._process.is_alive():
                    self._pipe = self._start()
                self._pipe.send(work)
                made, error = self._pipe.recv()
            except (EOFError, OSError) as lost:
                self.close()
                raise RuntimeError("The process that tokenized this text has died; ask again.") from lost
        if error is not None:
            raise error
        return made

    def _start(self) -> Connection:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_tokenize, args=(theirs, self._tokenizer), daemon=True)
        self._process.start()
        theirs.close()
        return ours

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _tokenize(pipe: Connection, tokenizer: PreTrainedTokenizerBase) -> None:
    """The process: it imports neither torch nor a model's code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the terminal, where the server decides what it means
    with suppress(EOFError, OSError):
        while True:
            make, given = pipe.recv()
            try:
                told: tuple[Asked | None, Exception | None] = make(tokenizer, *given), None
            except InputError as error:
                told = None, error
            except Exception as error:  # of any class, which need not travel
                told = None, RuntimeError(unexpected(error))
            pipe.send(told)
