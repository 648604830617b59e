"""What the server has read and keeps: across a restart, for two requests at once, and when its files are damaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import apb
from apb.serving.answers import Answer, Passed, Progress, Task
from apb.serving.kept import Places
from apb.serving.prompts import Asked
from apb.serving.shelf import Shelf
from apb.serving.worker import Worker

TEXT = tuple(3 + i * i % 90 for i in range(1200))
WHO, WHERE = (10, 11, 12), (20, 21, 22, 23)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> apb.Engine:
    return apb.Engine.from_pretrained(checkpoint, strategy="full", device="cpu")


def places(folder: Path) -> Places:
    return Places(0, str(folder), 1 << 30)


def expected(engine: apb.Engine, question: Sequence[int], text: Sequence[int] = TEXT) -> list[int]:
    return engine.generate(apb.Prompt.from_tokens((), text, question), max_new_tokens=6).token_ids


def asked(worker: Worker, *questions: Sequence[int]) -> list[tuple[bool, list[int]]]:
    """For questions that are asked at once: whether the text was read for one, and the answer's tokens."""
    told: list[list[Any]] = [[] for _ in questions]
    for question, events in zip(questions, told, strict=True):
        worker.submit(Task(apb.Prompt.from_tokens((), TEXT, question), {"max_new_tokens": 6}), events.append)
    worker.run(lambda: all(None in events for events in told))
    return [
        (any(isinstance(event, Progress) for event in events), events[-2].result.token_ids)
        for events in told
        if isinstance(events[-2], Answer)
    ]


def test_across_a_restart(engine: apb.Engine, tmp_path: Path) -> None:
    """Written when the server ends, found by the next one, which reads the question alone; not by another reading."""
    assert asked(Worker(engine, places(tmp_path)), WHO) == [(True, expected(engine, WHO))]
    again = Worker(engine, places(tmp_path))
    assert (again.kept.told.documents, again.kept.told.bytes["disk"] > 0) == (1, True)
    assert asked(again, WHERE) == [(False, expected(engine, WHERE))] and again.kept.told.hits == 1
    assert asked(again, WHO) == [(False, expected(engine, WHO))]
    other = apb.Engine.from_model(engine.model, engine.tokenizer, strategy="apb", blocks=3)
    try:
        assert Worker(other, places(tmp_path)).kept.told.documents == 0
    finally:
        other.close()


def test_written_when_there_is_nothing_else_to_do(engine: apb.Engine, tmp_path: Path) -> None:
    """So that a server that is killed loses nothing that it had read before."""
    worker, told = Worker(engine, places(tmp_path)), []
    worker.submit(Task(apb.Prompt.from_tokens((), TEXT, WHO), {"max_new_tokens": 2}), told.append)

    def written() -> bool:
        return bool(list(tmp_path.glob("*/*/document.json")))

    seen: list[bool] = []
    worker.run(lambda: seen.append(written()) or seen[-1])  # type: ignore[func-returns-value]
    assert seen[-1] and told[-1] is None and not worker.draining


@pytest.mark.parametrize("what", ["keys", "manifest"])
def test_damaged_documents_are_read_anew(
    engine: apb.Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """With a line that says so; what is written afterwards is whole."""
    asked(Worker(engine, places(tmp_path)), WHO)
    if what == "keys":
        path = next(tmp_path.glob("*/*/shard-*"))
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    else:
        next(tmp_path.glob("*/*/document.json")).write_text("{")
    assert asked(Worker(engine, places(tmp_path)), WHO) == [(True, expected(engine, WHO))]
    assert capsys.readouterr().err.startswith("apb: a document is ")
    assert asked(Worker(engine, places(tmp_path)), WHO) == [(False, expected(engine, WHO))]


def test_two_requests_at_once_on_one_document(engine: apb.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second asks a copy while the first is being answered; both are as if alone, and only one is kept."""
    worker, copy, copied = Worker(engine), apb.Document.copy, []
    monkeypatch.setattr(apb.Document, "copy", lambda document: copied.append(document) or copy(document))
    kept, sessions, closes = worker.kept, [], []
    for question in (WHO, WHERE):
        prompt = apb.Prompt.from_tokens((), TEXT, question)
        assert kept.read_of(prompt) == (len(TEXT) if sessions else 0)
        session, _, close = kept.open(prompt, 6, lambda *_: None, lambda: None)
        sessions.append(session)
        closes.append(close)
    told: list[list[int]] = [[], []]
    for _ in range(6):  # in turns
        for session, tokens in zip(sessions, told, strict=True):
            tokens.append(int(session.logits.argmax()))
            session.extend(tokens[-1:])
    assert told == [expected(engine, WHO), expected(engine, WHERE)]
    assert len(copied) == 1 and kept.told.documents == 1
    for close in closes:
        close()
    assert asked(worker, WHERE, WHO) == [(False, told[1]), (False, told[0])] and kept.told.hits == 3


def test_a_copy_of_a_document_in_use(engine: apb.Engine) -> None:
    """It holds the document alone, in memory of its own."""
    document = engine.read(tokens=TEXT)
    session = document.prefill(WHO)
    other = document.copy()
    said = other.prefill(WHERE).logits
    session.extend([5])
    assert said.equal(document.prefill(WHERE).logits)
    assert other.state.cache.total == len(TEXT) + len(WHERE)


def test_given_documents_are_there_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once they have been read; one that is deleted, or damaged, is not."""
    shelf, prompt = Shelf(tmp_path), apb.Prompt((), TEXT, WHO)
    kept = [shelf.put(text, None, "Who?", prompt) for text in ("one", "two", "three", "four")]
    for each in kept[:3]:
        shelf.heard(each, Progress(5, 9))
        shelf.heard(each, None)
    shelf.remove(kept[0].id)
    (tmp_path / "given" / f"{kept[2].id}.json").write_text(json.dumps({"id": 3}))
    again = Shelf(tmp_path)
    assert [each.told() for each in again] == [kept[1].told()] and again[kept[1].id].text == "two"
    assert kept[2].id in capsys.readouterr().err


def test_given_documents_that_a_question_has_read(tmp_path: Path) -> None:
    """They are there again too, with what was passed on, in characters."""
    prompt = apb.Prompt.from_tokens((), (1, 2, 3), (4,))
    shelf, asked = Shelf(tmp_path), Asked(prompt, {}, False, lambda first, last: (10 * first, 10 * last))
    kept = shelf.put("a text", None, None, prompt)
    shelf.overheard(kept, asked, "Who?", Progress(1, 2))
    assert [each.id for each in Shelf(tmp_path)] == []
    shelf.overheard(kept, asked, "Who?", Passed([(1, 2, 0.5)], [], "this question"))
    again = Shelf(tmp_path)[kept.id]
    passages = {"data": [{"start": 10, "stop": 20, "share": 0.5}], "went_on": []}
    assert again.passages() == {"object": "list", "question": "Who?"} | passages
    shelf.overheard(kept, asked, "Where?", Passed(None, (), "another question"))  # found on disk: nothing new
    assert kept.passages() == again.passages()
