"""Long texts are tokenized in other processes, as they would be here; one that dies takes a single text with it."""

from __future__ import annotations

import asyncio

import psutil
import pytest

import apb
from apb.serving import tokenizing as module
from apb.serving.prompts import Asked, Said, asked
from apb.serving.tokenizing import Tokenizing
from byte_checkpoint import TEMPLATE, byte_tokenizer
from families import OLD

DOCUMENT = "The lighthouse keeper of Orrin was called Maud. " * 50
SAID = [Said("user", ["Who?"])]


def workers() -> list[psutil.Process]:
    """Processes that tokenize."""
    found = psutil.Process().children()
    return [each for each in found if any("spawn_main" in part for part in each.cmdline())]


def told(made: Asked) -> tuple[object, ...]:
    """All that is known of a prompt."""
    return made.prompt, made.question, made.ordinary, made.characters(3, 9)


def test_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts and the same errors; the process is needed for long ones alone, and ends when told to."""
    monkeypatch.setattr(module, "LONG", len(DOCUMENT))
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizing = Tokenizing(tokenizer, None, 10_000)

    async def ask() -> None:
        short = await tokenizing.chat(SAID, DOCUMENT[:100])
        assert told(short) == told(asked(tokenizer, SAID, DOCUMENT[:100])) and not workers()
        lost = asyncio.create_task(tokenizing.chat(SAID, DOCUMENT))
        while not workers():
            await asyncio.sleep(0.01)
        workers()[0].kill()
        with pytest.raises(RuntimeError, match="has died; ask again"):
            await lost
        assert told(await tokenizing.chat(SAID, DOCUMENT)) == told(asked(tokenizer, SAID, DOCUMENT))
        assert (await tokenizing.plain(DOCUMENT)).characters(0, 5) is None
        with pytest.raises(apb.InputError, match="message from user is empty"):
            await tokenizing.chat([Said("user", [" "])], DOCUMENT)
        with pytest.raises(apb.InputError, match="at most 10,000"):
            await tokenizing.plain("x" * 10_001)
        torch = [file.path for worker in workers() for file in worker.memory_maps() if "libtorch" in file.path]
        assert len(workers()) >= 1 and (OLD or not torch)

    try:
        asyncio.run(ask())
    finally:
        tokenizing.close()
    assert not workers()


def test_code_of_a_checkpoint_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process would not find it."""
    monkeypatch.setattr(module, "LONG", 1)
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer.__class__ = type("Own", (type(tokenizer),), {"__module__": "transformers_modules.own"})
    tokenizing = Tokenizing(tokenizer, None, 10_000)
    assert asyncio.run(tokenizing.plain("Maud")).ordinary and not workers()
