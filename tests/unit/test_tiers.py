"""Documents in bounded memory: where they are, and that they say the same from everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_document import PROMPT, QUESTIONS, engine_of, llama, read

import apb
from apb import store
from apb.hf.host import HostCopy
from apb.hf.shard_layer import ShardLayer
from apb.state import ROOM
from cases import VOCABULARY

# Bytes of a token: keys and values of three layers of two heads of 16 numbers in fp32.
TOKEN = 2 * 3 * 2 * 16 * 4
KEYS = "abcde"


def text_of(key: str) -> tuple[int, ...]:
    return tuple((ord(key) * i * i + 7 * i) % VOCABULARY for i in range(40))


# Tokens of a document, which was read for its last token, and those with the room for more.
HELD, WHOLE = 40 * TOKEN + TOKEN, (40 + 1 + 1 + ROOM) * TOKEN + TOKEN


def keeper(engine: apb.Engine, device: int, host: int, folder: Path | None = None, disk: int = 0) -> apb.Documents:
    """Room for so many documents in each place."""
    return apb.Documents(engine, device * WHOLE, host * HELD, folder, disk * (HELD + 4000))


def places(documents: apb.Documents, keys: str = KEYS) -> list[str | None]:
    return [documents.place(key) for key in keys]


def test_what_does_not_fit_moves_down(tmp_path: Path) -> None:
    """Device, host, disk, gone; asking brings a document back, and all bytes are within their bounds at all times."""
    engine = engine_of(llama(), "full")
    documents = keeper(engine, 1, 1, tmp_path, 3)
    said = {}
    for key in "abcdef":
        document = documents.read(key, tokens=text_of(key))
        said[key] = document.prefill(QUESTIONS[2]).logits
    assert places(documents, "abcdef") == [None, "disk", "disk", "disk", "host", "device"]
    assert ("a" in documents, "b" in documents) == (False, True)
    with pytest.raises(apb.InputError, match="no document 'a'"):
        documents.document("a")
    documents.forget("b")  # a place more than documents: one that comes back needs its own and that it makes free
    for key in "dcefddecfc":
        assert torch.equal(documents.document(key).prefill(QUESTIONS[2]).logits, said[key]), key
        taken = documents.bytes()
        assert documents.place(key) == "device"
        assert taken["device"] <= WHOLE and taken["host"] <= HELD and taken["disk"] <= 3 * (HELD + 4000)
        assert taken["disk"] == sum(path.stat().st_size for path in tmp_path.glob("*/shard-*"))


def test_bytes_are_those_of_keys_values_and_tail() -> None:
    engine = engine_of(llama(), "full")
    documents = keeper(engine, 1, 2)
    documents.read("a", tokens=text_of("a"))
    assert documents.bytes() == {"device": WHOLE, "host": 0, "disk": 0}
    documents.read("b", tokens=text_of("b"))
    assert documents.bytes() == {"device": WHOLE, "host": HELD, "disk": 0}
    documents.document("a")  # its copy stays, and b's is made
    assert documents.bytes() == {"device": WHOLE - 2 * TOKEN, "host": 2 * HELD, "disk": 0}


@pytest.mark.parametrize("strategy", ["full", "apb"])
def test_conversations_and_own_questions_survive(strategy: str, tmp_path: Path) -> None:
    """From host memory and from disk: the question it was read for bit for bit, kept turns, a text that goes on."""
    engine = engine_of(llama(), strategy)
    alone = read(engine, question=PROMPT.query)
    own = alone.prefill(PROMPT.query).logits
    first = alone.ask(QUESTIONS[0], keep=True, max_new_tokens=4).token_ids
    second = alone.ask(QUESTIONS[1], max_new_tokens=4).token_ids
    size = 2000 * TOKEN
    for host in (size, 0):
        documents = apb.Documents(engine, size, host, tmp_path, 9 * size)
        documents.add("x", read(engine, question=PROMPT.query))

        def away(documents: apb.Documents = documents, host: int = host) -> None:
            """Read others, until x has left."""
            for key in KEYS:
                documents.read(key, tokens=text_of(key))
            assert documents.place("x") == ("host" if host else "disk")

        away()
        assert torch.equal(documents.document("x").prefill(PROMPT.query).logits, own)
        assert documents.ask("x", QUESTIONS[0], keep=True, max_new_tokens=4).token_ids == first
        away()
        assert documents.ask("x", QUESTIONS[1], max_new_tokens=4).token_ids == second
        away()
        longer = (*PROMPT.document, 5, 6, 7)
        document = documents.document("x")
        grown = documents.add("x", engine.read(tokens=longer, prefix=PROMPT.prefix, after=document))
        expected = grown.prefill(QUESTIONS[3]).logits
        away()
        assert torch.equal(documents.document("x").prefill(QUESTIONS[3]).logits, expected)


def test_moving_down_again_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to host memory nor to disk, as long as no turns are kept."""
    engine = engine_of(llama(), "full")
    made: list[str] = []
    copied, saved = HostCopy.__init__, store.save

    def copying(self: HostCopy, *args: Any) -> None:
        made.append("host")
        copied(self, *args)

    def saving(*args: Any) -> None:
        made.append("disk")
        saved(*args)

    monkeypatch.setattr(HostCopy, "__init__", copying)
    monkeypatch.setattr(store, "save", saving)
    for host, place in ((9, "host"), (0, "disk")):
        documents = keeper(engine, 1, host, tmp_path / place, 9)
        for key in "ab":
            documents.read(key, tokens=text_of(key))
        for _ in range(2):
            documents.ask("a", QUESTIONS[0], max_new_tokens=2)
            documents.ask("b", QUESTIONS[0], max_new_tokens=2)
        assert made == [place, place]
        documents.ask("b", QUESTIONS[0], max_new_tokens=2, keep=True)
        documents.document("a")
        assert made == [place, place, place]
        made.clear()


def test_layers_arrive_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layers read the question while the others are still on their way."""
    engine = engine_of(llama(), "full")
    document = read(engine)
    expected = document.prefill(QUESTIONS[2]).logits
    copy = document.leave(None)
    document.come_back(copy)
    waiting, update = [], ShardLayer.update

    def updating(self: ShardLayer, *args: Any, **options: Any) -> Any:
        waiting.append([layer.arriving is not None for layer in document.state.cache.layers])
        return update(self, *args, **options)

    monkeypatch.setattr(ShardLayer, "update", updating)
    assert torch.equal(document.prefill(QUESTIONS[2]).logits, expected)
    assert waiting == [[True, True, True], [False, True, True], [False, False, True]]


@pytest.mark.parametrize("use", ["gather_kv", "save", "leave", "grow", "own"])
def test_nothing_is_used_before_it_has_arrived(use: str, tmp_path: Path) -> None:
    engine = engine_of(llama(), "full")
    document = read(engine, question=PROMPT.query)
    expected = document.prefill(QUESTIONS[2]).logits
    document.come_back(document.leave(None))
    for layer in document.state.cache.layers:
        layer.keys.fill_(float("nan"))
    if use == "gather_kv":
        assert document.prefill(PROMPT.query).gather_kv(1)[0].isfinite().all()
    elif use == "save":
        document.save(tmp_path)
        document = engine.load(tmp_path)
    elif use == "leave":
        document.come_back(document.leave(None))
    elif use == "grow":
        document.state.cache.reserve(5000)
    else:
        assert document.prefill(PROMPT.query).extend([1]).isfinite().all()
    assert torch.equal(document.prefill(QUESTIONS[2]).logits, expected)


def test_a_first_question_copies_no_storage(tmp_path: Path) -> None:
    """There is room for it after reading, after loading, and after coming back from host memory."""
    engine = engine_of(llama(), "full")
    document = read(engine)
    document.save(tmp_path)
    for each in (document, engine.load(tmp_path)):
        for _ in range(2):
            before = each.state.cache.addresses()
            each.prefill(QUESTIONS[9], max_new_tokens=ROOM - len(QUESTIONS[9]))
            assert each.state.cache.addresses() == before
            each.come_back(each.leave(None))
    before = document.state.cache.nbytes
    document.prefill(QUESTIONS[9], max_new_tokens=3000)
    grown = document.state.cache.addresses()
    assert document.state.cache.nbytes > before
    document.ask(QUESTIONS[9], max_new_tokens=600, temperature=0.0)
    assert document.state.cache.addresses() == grown  # in one step


def test_another_keeper_finds_the_folder(tmp_path: Path) -> None:
    """What was on disk is there again, checked before it is used, and the oldest goes first."""
    engine = engine_of(llama(), "full")
    documents = keeper(engine, 1, 0, tmp_path, 9)
    for key in "abc":
        documents.read(key, tokens=text_of(key))
    expected = documents.ask("b", QUESTIONS[4], max_new_tokens=4).token_ids
    again = keeper(engine, 1, 0, tmp_path, 9)
    assert places(again, "abc") == ["disk", "disk", "disk"]
    assert again.ask("b", QUESTIONS[4], max_new_tokens=4).token_ids == expected
    assert places(keeper(engine, 1, 0, tmp_path, 1), "abc") == [None, None, "disk"]
    path = next(tmp_path.glob("*/shard-*"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(apb.InputError, match="is not what was written"):
        keeper(engine, 1, 0, tmp_path, 1).document("c")


def test_what_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence each; a document that has moved is asked by its key, and a full disk forgets it with a warning."""
    engine = engine_of(llama(), "full")
    with pytest.raises(apb.InputError, match="device_bytes is 1,000"):
        apb.Documents(engine, 1000, 0).read("a", tokens=text_of("a"))
    documents = keeper(engine, 1, 1, tmp_path, 9)
    moved = documents.read("a", tokens=text_of("a"))
    session = moved.prefill(QUESTIONS[0])
    documents.read("b", tokens=text_of("b"))
    for use in (lambda: moved.prefill(QUESTIONS[0]), lambda: session.extend([1])):
        with pytest.raises(RuntimeError, match="has left the device"):
            use()

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.warns(UserWarning, match="forgotten.*No space left on device"):
        documents.read("c", tokens=text_of("c"))
    assert places(documents, "abc") == [None, "host", "device"]
    with pytest.raises(RuntimeError, match="dropped"):
        moved.save(tmp_path / "d")
    documents.forget("c")
    assert documents.bytes()["device"] == 0 and "c" not in documents
