"""`apb read`, `apb ask`, `apb documents`: what is kept is what the library keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import apb
from command_line import Cli

TEXT = "The lighthouse keeper of Orrin was called Maud. " * 12


@pytest.fixture
def stored(cli: Cli, checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    place = ("--model", checkpoint, "--device", "cpu")
    done = cli("read", "--document", tmp_path / "text.txt", "--out", tmp_path / "a", "--blocks", 4, *place)
    assert (done.status, done.out) == (0, "")
    assert "577 tokens" in done.err
    assert "by apb (approximate)" in done.err
    assert "for no question" in done.err
    return tmp_path / "a"


def test_answers_are_the_librarys(cli: Cli, checkpoint: Path, stored: Path) -> None:
    """One object for one question, a list for several; the model and its dtype are those it was read by."""
    engine = apb.Engine.from_pretrained(checkpoint, blocks=4, device="cpu")
    document = engine.read(TEXT)
    expected = [document.ask(query, max_new_tokens=7).token_ids for query in ("Who?", "Where?")]
    engine.close()
    given = ("ask", stored, "--device", "cpu", "--max-new-tokens", 7)
    one = cli(*given, "--query", "Who?", "--json").json
    assert (one["token_ids"], one["read_for"]) == (expected[0], "no question")
    assert (one["exact"], one["strategy"]) == (False, "apb")
    several = cli(*given, "--query", "Who?", "--query", "Where?", "--json").json
    assert [each["token_ids"] for each in several] == expected
    plain = cli(*given, "--query", "Who?")
    assert plain.out == one["text"] + "\n"
    assert "apb: apb (approximate), read for no question" in plain.err


def test_questions_from_standard_input(cli: Cli, stored: Path) -> None:
    given = ("ask", stored, "--device", "cpu", "--max-new-tokens", 3, "--json")
    assert len(cli(*given, stdin=b"Who?\n\nWhere?\n").json) == 2
    cli(*given).refused("No question was given")


def test_what_is_there(cli: Cli, checkpoint: Path, stored: Path) -> None:
    for place in (stored, stored.parent):
        (found,) = cli("documents", place, "--json").json
        assert (found["store"], found["tokens"], found["strategy"], found["ranks"]) == (str(stored), 577, "apb", 1)
        assert found["bytes"] == sum(path.stat().st_size for path in stored.glob("*.safetensors"))
        assert (found["read_for"], found["dtype"], found["model"]) == ([], "float32", str(checkpoint))
        assert f"{stored}: 577 tokens, " in cli("documents", place).out


def test_questions_it_is_read_for(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given: Any = ("read", "--document", tmp_path / "text.txt", "--model", checkpoint, "--device", "cpu", "--json")
    one = cli(*given, "--out", tmp_path / "one", "--question", "Who?", "--blocks", 4).json
    assert one["read_for"] == ["Who?"]
    two = cli(*given, "--out", tmp_path / "two", "--question", "Who?", "--question", "Where?").json
    assert two["read_for"] == ["Who?", "Where?"]
    asked: Any = ("ask", tmp_path / "one", "--device", "cpu", "--max-new-tokens", 1, "--json", "--query")
    assert cli(*asked, "Who?").json["read_for"] == "this question"
    assert cli(*asked, "Where?").json["read_for"] == "another question"
    assert cli(*asked, "Where?", "--reread", "auto").json["read_for"] == "this question"
    cli(*asked, "Where?", "--reread", "always").refused("never or auto")


def test_places_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    """Refused before the text is read."""
    (tmp_path / "file").write_text("text")
    given: Any = ("read", "--document", tmp_path / "nowhere", "--out")
    cli(*given, "").refused("empty name", "current")
    cli(*given, tmp_path / "file").refused("is a file", "name a folder")
    cli(*given, tmp_path / "file" / "a").refused("is a file", "name a folder")
    cli(*given, tmp_path / "a", "--question", " ").refused("question is empty")
    cli("train", "needle", "--out", tmp_path / "file").refused("is a file", "name a folder")


def test_a_document_is_asked_from_anywhere(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The model's folder is stored as it can be found from any other; where it has gone, the way out is said."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    shutil.copytree(checkpoint, "model")
    assert cli("read", "--document", "text.txt", "--out", "a", "--model", "model", "--device", "cpu").status == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    asked: Any = ("ask", "../a", "--query", "Who?", "--device", "cpu", "--max-new-tokens", 1)
    assert cli(*asked).status == 0
    (tmp_path / "model").rename(tmp_path / "other")
    cli(*asked).refused("does not exist", "the document in '../a' names it", "--model PATH")
    assert cli(*asked, "--model", "../other").status == 0
    cli(*asked[:-1], 99_999_999, "--model", "../other").refused("or the answer", "of generate, read, ask")
    longest: Any = (*asked[:-1], 10**12, "--allow-extrapolation", "--model", "../other")
    cli(*longest).refused("new tokens alone", "shorter answer")


@pytest.mark.parametrize(
    "field",
    [{"tokens": "x"}, {"sizes": None}, {"sizes": [1, 2]}, {"shards": [None]}, {"model": {"name": 3}}, {"index_s": "1"}],
    ids=str,
)
def test_manifests_that_were_edited(cli: Cli, tmp_path: Path, field: dict[str, Any]) -> None:
    """A field of another type is named, by every command that reads it."""
    manifest = {
        **{"format": 3, "apb": "0", "created": "", "model": {"name": "a", "fingerprint": "b"}, "dtype": "float32"},
        **{"tokens": 5, "tokens_sha256": "", "strategy": "full", "options": {}, "propagation": None, "exact": True},
        **{"sizes": [1, 3, 1, 1, 1], "compressor": None, "read_for": [], "prefill_s": 0.5, "index": None},
        **{"index_s": 0.0, "asking": {}, "shards": [{"file": "shard", "bytes": 9, "sha256": ""}]},
    }
    (tmp_path / "document.json").write_text(json.dumps(manifest))
    assert cli("documents", tmp_path).status == 0
    (tmp_path / "document.json").write_text(json.dumps(manifest | field))
    for command in (["documents", tmp_path], ["ask", tmp_path, "--query", "Who?"]):
        cli(*command).refused("is damaged: document.json has", "read the text again")


def test_what_is_refused(cli: Cli, stored: Path, tmp_path: Path) -> None:
    """One sentence, status 2."""
    cli("ask", tmp_path / "nowhere", "--query", "Who?").refused("There is no document")
    cli("documents", tmp_path / "nowhere").refused("does not exist")
    for command in (["documents"], ["ask", "--query", "Who?"]):
        cli(*command, tmp_path / "text.txt").refused("is a file", "name a document's folder")
    (tmp_path / "empty").mkdir()
    cli("documents", tmp_path / "empty").refused("There is no document")
    cli("ask", stored, "--query", "Who?", "--dtype", "bfloat16", "--device", "cpu").refused("float32", "bfloat16")
    cli("ask", stored, "--query", " ", "--device", "cpu").refused("query is empty")
    cli("ask", stored, "--ranks", 2, "--device", "cpu").refused("--query")
    for path in stored.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    cli("ask", stored, "--query", "Who?", "--device", "cpu").refused("damaged", "bytes")


def test_a_decode_method(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Its index is made with the document, and told; answers say what they attended to."""
    (tmp_path / "text.txt").write_text(TEXT)
    how = ("--device", "cpu", "--decode", "pages", "--page-size", 8)
    read = ("read", "--document", tmp_path / "text.txt", "--out", tmp_path / "a", "--model", checkpoint, "--blocks", 1)
    assert "its index of pages of 8 in " in cli(*read, *how).err
    (found,) = cli("documents", tmp_path / "a", "--json").json
    assert found["index"] == ["pages", 8] and isinstance(found["index_s"], float)
    given = ("ask", tmp_path / "a", "--query", "Who?", "--max-new-tokens", 4, *how, "--share", 0.3)
    told = cli(*given, "--json").json["decode"]
    assert (told["method"], told["exact"]) == ("pages", False) and 0.2 < told["share"] < 0.35
    assert f", pages: tokens attended to {told['share']:.1%} of the keys" in cli(*given).err
    cli("ask", tmp_path / "a", "--query", "Who?", "--device", "cpu", "--decode", "all").refused("Unknown decode method")
