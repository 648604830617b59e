"""What a terminal shows of a prefill, and that nothing but a terminal is shown it."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from apb.cli.progress import Bar, Picture
from apb.planning.plan import Plan
from command_line import Cli

ROOT = Path(__file__).parents[2]
TEXT = "The lighthouse keeper of Orrin was called Maud. " * 12


class Terminal(io.StringIO):
    """Takes what a command draws."""

    def isatty(self) -> bool:
        return True

    @property
    def last(self) -> str:
        """The text of the last picture: what follows the last time that the cursor went up."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", re.split(r"\x1b\[1A\x1b\[2K|\x1b\[\d*A", self.getvalue())[-1])


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a terminal with 60 columns, if there is one."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "60", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)


def drawn(plan: Plan, done: int, width: int = 48, height: int = 10, ascii_only: bool = False) -> list[str]:
    return [line.plain.rstrip() for line in Picture(plan).lines(done, width, height, ascii_only)]


def test_who_reads_what() -> None:
    """Blocks at their places on their ranks' rows; those of a round fill together, as do their passed pairs."""
    plan = Plan.build(1, 79, 8, blocks=4, ranks=2, anchor_length=9, passing_length=10)
    assert drawn(plan, 44) == [
        "apb: 4 blocks, approximate, anchor 9, passing 10",
        "rank 0  ━━━━─────                     ━━━━─────",
        "rank 1            ━━━━───── ━━━━─────",
        "passed  ━━───     ━━───     ━━───",
    ]
    assert drawn(plan, 88)[1] == "rank 0  ━━━━━━━━━                     ━━━━━━━━━"


def test_rounds_follow_each_other() -> None:
    """Half of the blocks are read before the other half begins, and the question's rows count with the last."""
    plan = Plan.build(0, 80, 8, blocks=4, rounds=2, anchor_length=9, passing_length=10)
    read = {done: drawn(plan, done)[1][8:].split() for done in (0, 20, 40, 64, 88)}
    none, half, whole = "─" * 9, "━━━━─────", "━" * 9
    assert read[0] == [none] * 4
    assert read[20] == [half, half, none, none]
    assert read[40] == [whole, whole, none, none]
    assert read[64] == [whole, whole, half, half]
    assert read[88] == [whole] * 4


def test_what_does_not_fit() -> None:
    """Ranks beyond the terminal's height are counted; more blocks than columns, and no more letters than ASCII."""
    many = drawn(Plan.build(0, 6400, 8, blocks=64, ranks=16, passing_length=8), 6408, width=40, height=4)
    assert [line.split("  ")[0] for line in many[1:]] == ["rank 0", "rank 1", "rank 2", "and 13 more ranks", "passed"]
    assert all(len(line) <= 40 for line in many[1:])
    assert drawn(Plan.build(0, 80, 8, strategy="full"), 44, ascii_only=True)[1:] == ["rank 0  " + "=" * 19 + "-" * 20]


def test_on_a_terminal() -> None:
    """The picture stands above the bar and stays when all is read."""
    plan = Plan.build(1, 79, 8, blocks=2, anchor_length=9, passing_length=10)
    with redirect_stderr(terminal := Terminal()), Bar("Reading", "token") as bar:
        bar.begin(plan)
        bar.update(44, 88)
        bar.update(88, 88)
    lines = [line.rstrip() for line in terminal.last.splitlines() if line.strip()]
    assert lines[:3] == [line.plain.rstrip() for line in Picture(plan).lines(88, 60, 18)]
    assert "Reading" in lines[3] and "token 88 of 88" in lines[3]


@pytest.mark.parametrize("command", ["generate", "read"])
def test_commands(cli: Cli, checkpoint: Path, tmp_path: Path, command: str) -> None:
    """On a terminal they draw it; with --json there is the bar alone, and standard output is the same as ever."""
    (tmp_path / "text.txt").write_text(TEXT)
    how = ["--document", tmp_path / "text.txt", "--model", checkpoint, "--device", "cpu", "--blocks", 4]
    how += ["--query", "Who?", "--max-new-tokens", 3] if command == "generate" else ["--out", tmp_path / "store"]
    with redirect_stderr(terminal := Terminal()):
        assert cli(command, *how).status == 0
    assert re.search(r"apb: 4 blocks, approximate, .*\nrank 0 +━+ ━+ ━+ ━+\npassed +━+ +━+ +━+ *\n", terminal.last)
    with redirect_stderr(plain := Terminal()):
        assert cli(command, *how, "--json").json
    assert "Reading" in plain.last and "rank 0" not in plain.getvalue()


def test_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """A line that a log can keep, and nothing else."""
    with Bar("Reading", "token") as bar:
        bar.begin(Plan.build(1, 79, 8, blocks=2))
        bar.update(44, 88)
        bar.update(88, 88)
    assert capfd.readouterr().err == "Reading: token 88 of 88\n"


def test_the_picture_in_the_docs() -> None:
    """docs/plan.md: 65,536 tokens on two ranks, as far as they are read."""
    lines = drawn(Plan.build(1, 65_536, 32, blocks=8, ranks=2), 26_000, width=76)
    assert "```text\n" + "\n".join(lines) + "\n```" in (ROOT / "docs/plan.md").read_text(encoding="utf-8")
