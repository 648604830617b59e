"""The scripts of examples/ on the shipped model, each finding a number in files of its kind, and the notebook."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = [f"On day {day} the keeper cleaned the lamp and walked to the marsh.\n" for day in range(40)]
FACT = "The number of the old lantern is 482137.\n"
QUESTION = "Which number belongs to the old lantern?"

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example in this process; what it printed."""

    def call(name: str, *arguments: object, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_folder(run: Run, tmp_path: Path) -> None:
    """Read once; a second call asks the store, and a changed file is read again."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(LINES[:20]))
    (folder / "b.txt").write_text(FACT)
    assert "482137" in run("folder.py", folder, QUESTION)
    manifest = tmp_path / "notes.store/document.json"
    written = manifest.stat().st_mtime_ns
    assert "482137" in run("folder.py", folder, QUESTION) and manifest.stat().st_mtime_ns == written
    (folder / "b.txt").write_text(FACT.replace("482137", "555111"))
    assert "555111" in run("folder.py", folder, QUESTION) and manifest.stat().st_mtime_ns > written
    with pytest.raises(SystemExit, match=r"no \*.md files"):
        run("folder.py", folder, QUESTION, "--pattern", "*.md")


def test_book(run: Run, tmp_path: Path) -> None:
    """A question a line, answered one after the other."""
    (tmp_path / "book.txt").write_text("".join([*LINES, FACT, *LINES]))
    said = run("book.py", tmp_path / "book.txt", stdin=f"{QUESTION}\n\n{QUESTION}\n")
    assert said.count(f"> {QUESTION}\n") == 2 and "482137" in said.split(">")[1]


def test_code(run: Run, tmp_path: Path) -> None:
    """Files with the suffixes asked for, without those of skipped folders."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/c.md").write_text(FACT.replace("482137", "555111"))
    (tmp_path / "a.md").write_text("".join([*LINES, FACT]))
    (tmp_path / "b.py").write_text(FACT.replace("482137", "555111"))
    said = run("code.py", tmp_path, QUESTION, "--suffix", ".md")
    assert "482137" in said and "555111" not in said


def test_log(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that come later are read with the next look, whole ones only."""
    log = tmp_path / "service.log"
    log.write_text("".join(LINES))

    def sleep(seconds: float) -> None:
        with log.open("a") as file:
            file.write(FACT + "The number of the")

    monkeypatch.setattr("time.sleep", sleep)
    first, second = run("log.py", log, QUESTION, "--times", 2).splitlines()
    assert "482137" not in first and "482137" in second
    assert int(second.split()[0].replace(",", "")) > int(first.split()[0].replace(",", ""))


def test_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, run in order, prints what it holds, and its plot is there."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    known: dict[str, object] = {}
    drawn = []
    for cell in json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec("".join(cell["source"]), known)
            kept = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
            drawn += [output["data"] for output in cell["outputs"] if output["output_type"] == "display_data"]
            assert said.getvalue() == "".join(kept)
    assert len(drawn) == 1 and "image/png" in drawn[0]
