"""Tokenizing beside the event loop, on few threads, each with a tokenizer of its own, which are not thread-safe."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from ..errors import InputError
from .prompts import Asked, Said, asked, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Long texts must not keep short ones from being tokenized; most of the time Python's lock is not held.
_THREADS = 4

Made = TypeVar("Made")


class Tokenizing:
    """Makes prompts of requests, whose texts together have at most ``characters``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, characters: int) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template
        self._characters = characters
        self._own = threading.local()
        self._copying = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "tokenizing")

    async def chat(self, said: Sequence[Said], document: str | None) -> Asked:
        """The prompt of a chat; see :func:`apb.serving.prompts.asked`."""
        self._check(sum(len(each.text) for each in said) + len(document or ""))
        return await self._made(lambda tokenizer: asked(tokenizer, said, document, self._template))

    async def plain(self, text: str) -> Asked:
        """The prompt of a text; see :func:`apb.serving.prompts.plain`."""
        self._check(len(text))
        return await self._made(lambda tokenizer: plain(tokenizer, text))

    def name(self, token: int) -> str:
        """The text of one token."""
        with self._copying:
            return str(self._tokenizer.decode([token]))

    def _check(self, characters: int) -> None:
        if characters > self._characters:
            raise InputError(
                f"The texts of this request have {characters:,} characters, and at most {self._characters:,} are "
                "read; send a shorter text."
            )

    async def _made(self, make: Callable[[PreTrainedTokenizerBase], Made]) -> Made:
        def run() -> Made:
            if not hasattr(self._own, "tokenizer"):
                with self._copying:
                    self._own.tokenizer = copy.deepcopy(self._tokenizer)
            return make(self._own.tokenizer)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)
