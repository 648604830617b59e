"""The page of `apb serve`, used in a browser: with the shipped model, whose answers are known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_serving
from transformers import AutoTokenizer

import apb
from apb.evaluation.tasks import generate
from apb.serving.app import make_app
from browser import CHROMIUM, Browser

if CHROMIUM is None:
    # A browser is no Python package: nothing here can install it.
    pytest.skip("no Chromium is installed here", allow_module_level=True)

MODEL = Path(__file__).parents[2] / "models" / "needle"
KEY = "a key"
# The question follows the text as the model was trained; further turns are put after its answer.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' ' if message.role == 'assistant' }}{{ message.content }}"
    "{% if not loop.last %}\n\n{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def address(server_log: list[str]) -> Iterator[str]:
    """A server with an API key."""
    engine = apb.Engine.from_pretrained(MODEL, strategy="apb", blocks=4, device="cpu", dtype="float32")

    def named(ranks: Any, name: str, *rest: Any, **more: Any) -> Any:
        return make_app(ranks, MODEL.name, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_serving, "make_app", named)
        server = test_serving.Served(engine, TEMPLATE, (KEY,))
    yield f"http://127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    browser.size(1280, 800)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with 64 facts in it."""
    path = tmp_path_factory.mktemp("texts") / "register.txt"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    path.write_text(generate("multikey", tokenizer, length=2500, seed=7).document)
    return path


@pytest.fixture
def page(tab: Browser, address: str) -> Iterator[Browser]:
    """The page, opened anew, its key known; afterwards: nothing broke, and nothing was loaded from elsewhere."""
    tab.asked.clear()
    tab.size(1280, 800)
    tab.prefers("light")
    tab.send("Page.navigate", url=f"{address}/health")
    tab.until(f"location.pathname === '/health' && (sessionStorage.setItem('apb-key', {KEY!r}), true)")
    tab.open(address)
    yield tab
    assert tab.broken == []
    assert {url for url in tab.asked if not url.startswith((f"{address}/", "about:", "data:"))} == set()


def facts(text: Path) -> list[tuple[str, str]]:
    """Questions about a text, and their answers."""
    found = re.findall(r"The number of the (\w+ \w+) is (\d+)\.", text.read_text())
    return [(f"What is the number of the {key}?", value) for key, value in found]


def ask(page: Browser, question: str, turn: int = 1) -> str:
    """Type a question into what has the focus; the answer once it is complete."""
    page.write(question)
    page.press("Enter")
    page.until(
        f"document.querySelectorAll('.turn .facts')[{turn - 1}]?.textContent && document.querySelector('#stop').hidden"
    )
    return page.text(f".turn:nth-child({turn}) .answer").strip()


def test_a_text_is_asked(page: Browser, address: str, text: Path) -> None:
    """From a file to its answer, the passages that were passed on, a follow-up, and what is kept of it."""
    (question, answer), (next_question, next_answer) = facts(text)[1:3]
    page.give("#file", text)
    page.until("document.querySelector('#file-name').textContent === 'register.txt'")
    assert ask(page, question) == answer
    assert "Approximate: apb in 4 blocks." in page.text(".facts")
    shown = page.js("document.querySelector('#shown').textContent")
    assert shown == text.read_text()
    page.until("document.querySelectorAll('#shown mark').length")
    marks = page.js("[...document.querySelectorAll('#shown mark')].map(mark => mark.textContent)")
    assert any(answer in mark for mark in marks) and sum(map(len, marks)) < len(shown) / 4
    page.click("#after")
    assert page.text("#place") == f"1 of {page.js('document.querySelectorAll(`#shown mark`).length')} passages"
    while answer not in page.text("mark.here"):
        page.click("#after")
    page.keep("page", "light", "dark")

    page.click("#question")
    assert ask(page, next_question, turn=2) == next_answer
    assert "read for an earlier question" in page.text(".turn:nth-child(2) .facts")
    assert f"read for “{question}”" in page.text("#documents")
    page.click(".turn:nth-child(2) summary")
    assert "another question" in page.text(".turn:nth-child(2) dl")

    page.open(f"{address}/{page.js('location.hash')}")  # what is kept is there when the page is opened again
    page.until("document.querySelectorAll('#shown mark').length > 3")
    assert page.text("#name") == "register.txt"
    page.click("#documents button.quiet")
    page.click("#documents button.quiet")
    page.until("document.querySelector('#main').dataset.view === 'start' && document.querySelector('#kept').hidden")


def test_keys_alone(page: Browser, text: Path) -> None:
    """Everything can be reached and done without a mouse, in the order in which it is seen."""
    page.js("sessionStorage.clear()")
    page.send("Page.reload")
    page.until("document.querySelector('#key')?.open")
    for key, title in (("wrong", "This key is not"), (KEY, "")):
        page.write(key)
        page.press("Enter")
        if title:
            page.until(f"document.querySelector('#key-title').textContent.startsWith('{title}')")
    page.until("document.body.dataset.ready !== undefined")
    question, answer = facts(text)[4]
    page.press("Tab")
    reached = []
    for wanted in ("text", "choose", "question"):
        while (now := page.js("document.activeElement.id")) != wanted:
            assert len(reached) < 9
            reached.append(now)
            page.press("Tab")
        if wanted == "text":
            page.write(text.read_text())
    assert ask(page, question) == answer
    names = []
    for _ in range(9):
        page.press("Tab")
        names.append(page.js("(e => e.id || e.ariaLabel || e.tagName)(document.activeElement)"))
    assert [name for name in names if name in ("send", "after", "shown")] == ["send", "after", "shown"], names
    page.press("Tab", shift=True)
    unnamed = page.js(
        "[...document.querySelectorAll('button, textarea, input, progress, summary')].filter(e => !e.ariaLabel &&"
        "!e.textContent.trim() && !e.labels?.length).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_what_is_wrong_is_said(page: Browser, text: Path, tmp_path: Path) -> None:
    """In a sentence, by the page or by the server, and the question is still there."""
    page.click("#send")
    assert page.until("document.querySelector('#trouble').textContent").startswith("There is no question yet.")
    page.write("Who?")
    page.press("Enter")
    page.until("document.querySelector('#trouble').textContent.startsWith('There is no text yet.')")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x00\xff")
    page.give("#file", tmp_path / "picture.txt")
    page.until("document.querySelector('#trouble').textContent.startsWith('picture.txt is not plain text')")
    (tmp_path / "long.txt").write_text(text.read_text() * 20)
    page.give("#file", tmp_path / "long.txt")
    page.until("document.querySelector('#file-name').textContent === 'long.txt'")
    page.press("Enter")
    page.until("document.querySelector('.turn .facts.wrong')?.textContent.includes('more than the model')")
    assert page.js("document.querySelector('#question').value") == "Who?"
    off = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.send("Network.emulateNetworkConditions", offline=True, **off)
    page.press("Enter")
    page.until("document.body.innerText.includes('The server cannot be reached.')")
    page.send("Network.emulateNetworkConditions", offline=False, **off)


def test_a_narrow_window(page: Browser, text: Path) -> None:
    """At 375 pixels nothing has to be scrolled sideways, before and after an answer."""
    page.size(375, 760, scale=2)
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.js(wide)
    page.give("#file", text)
    page.until("!document.querySelector('#chosen').hidden")
    question, answer = facts(text)[1]
    assert ask(page, question) == answer
    page.until("document.querySelectorAll('#shown mark').length")
    page.click("summary")
    assert not page.js(wide)
    page.click("summary")
    while answer not in page.text("mark.here"):
        page.click("#after")
    page.js("document.querySelector('.turn').scrollIntoView()")
    page.keep("page-narrow", "light", "dark")
