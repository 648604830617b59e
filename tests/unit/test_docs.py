"""README and docs: the tutorial runs as it stands, every other command is one that the command line takes."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import apb
from apb.cli.main import app
from command_line import Cli, cli  # noqa: F401

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Before `apb` itself: where it is installed, and the settings of one command.
COMMAND = re.compile(r"^ *(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?apb +([a-z].*)$")


def commands() -> list[Any]:
    """Every `apb` command in a code block of a page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = "".join(block[2] for block in BLOCK.finditer(text) if block[1] in ("sh", "bash", "console"))
        indented = "\n".join(line for line in text.splitlines() if line.startswith("    "))
        for line in (fenced + indented).splitlines():
            if command := COMMAND.match(line):
                found.append(pytest.param(command[1], id=f"{page.stem}: {command[1][:60]}"))
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_are_taken(command: str) -> None:
    """Options and values are such as the command line knows; what they lead to is others' test."""
    arguments = shlex.split(re.split(r" [<>|] ", command)[0], comments=True)
    context = typer.main.get_command(app).make_context("apb", arguments)
    while hasattr(context.command, "commands"):
        name, *arguments = [*getattr(context, "_protected_args", ()), *context.args]
        context = context.command.commands[name].make_context(name, arguments, parent=context)


def test_the_tutorial(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Its text is made, and its commands and lines of Python find the number in it."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    for kind, block in BLOCK.findall(page):
        if made := re.match(r"python - <<'TEXT' > (\S+)\n(.*)^TEXT$", block, re.DOTALL | re.MULTILINE):
            with open(made[1], "w") as file, contextlib.redirect_stdout(file):
                exec(made[2], {})
        elif kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(block, {})
            assert "482137" in said.getvalue() and "no question" in said.getvalue()
        else:
            for line in block.strip().splitlines():
                done = cli(*shlex.split(line)[1:])
                assert done.status == 0, done.err
                asks = line.startswith(("apb generate", "apb ask"))
                assert "482137" in done.out or not asks, line


def test_python_snippets(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, on a tiny model that takes the place of the one named; the server's is run by its own test."""
    monkeypatch.chdir(tmp_path)
    original = apb.Engine.from_pretrained

    def load(name: Any, **options: Any) -> apb.Engine:
        engine = original(checkpoint, **options)
        engine.needed_tokenizer().chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
        return engine

    monkeypatch.setattr(apb.Engine, "from_pretrained", load)
    text = "The lighthouse keeper of Orrin was called Maud. " * 12
    prompt = apb.Prompt.from_text(load(checkpoint).needed_tokenizer(), text, "Who?")
    ran = 0
    for page in PAGES:
        known: dict[str, Any] = {
            "apb": apb,
            "text": text,
            "prompt": prompt,
            "model": "tiny",
            "engine": load(checkpoint),
        }
        for kind, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == "python" and page.stem not in ("tutorial", "serving"):
                exec(block.replace("positions(31)", "positions(1)"), known)
                ran += 1
    assert ran >= 5


@pytest.mark.parametrize("name", ["badges", "method", "speed"])
def test_drawings_are_those_of_their_scripts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/images/NAME-*.svg; `python docs/drawings/NAME.py` writes them."""
    monkeypatch.syspath_prepend(ROOT / "docs/drawings")
    script = runpy.run_path(str(ROOT / f"docs/drawings/{name}.py"))
    for theme in importlib.import_module("canvas").THEMES:
        assert (ROOT / f"docs/images/{name}-{theme.name}.svg").read_text() == script["drawing"](theme)


def test_what_badges_say_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text for those who do not see README's badges."""
    monkeypatch.syspath_prepend(ROOT / "docs/drawings")
    facts = runpy.run_path(str(ROOT / "docs/drawings/badges.py"))["facts"]()
    assert f'alt="{"; ".join(" ".join(each) for each in facts)}"' in (ROOT / "README.md").read_text()


def test_plots_are_those_of_their_results() -> None:
    """docs/images/plan.svg, bench-*.svg and eval-*.svg; `python docs/drawings/reports.py` writes them."""
    matplotlib = pytest.importorskip("matplotlib", reason="needs apb-llm[report]")
    for name, svg in runpy.run_path(str(ROOT / "docs/drawings/reports.py"))["drawings"]().items():
        kept = (ROOT / "docs/images" / name).read_text()
        drawer = re.findall(r"Matplotlib v(\S+?),", kept)[0]
        # What its characters say is the same by every version; where lines lie exactly is not.
        assert re.findall("<!-- (.*?) -->", kept) == re.findall("<!-- (.*?) -->", svg), name
        assert drawer != matplotlib.__version__ or kept == svg, name
