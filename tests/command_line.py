"""Running the command line in the tests' own process: a real one costs seconds of imports."""

from __future__ import annotations

import io
import json
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apb.cli.main import app, run


@dataclass
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON object and nothing else."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    def refused(self, *fragments: str) -> None:
        """Assert that the input was called wrong: status 2, one sentence on standard error, nothing else anywhere."""
        assert self.status == 2, (self.status, self.err)
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("apb: ")
        assert self.err.endswith(".\n")
        assert all(fragment in self.err for fragment in fragments), self.err


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Runs a command line in this process, with `stdin` as its standard input."""

    def call(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["apb", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = run(app)
        return Outcome(status, *capfd.readouterr())

    yield call
    logging.disable(logging.NOTSET)


def script(path: Path, *arguments: object) -> object:
    """Run a script in this process; what it exits with, which is a sentence or a status other than 0 if it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.syspath_prepend(path.parent)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code
    return None
