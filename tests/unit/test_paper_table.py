"""`benchmarks/paper_table.sh`: what it asks of `apb bench` on any number of GPUs, and what it says it leaves out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from apb.cli.main import app

ROOT = Path(__file__).parents[2]
BENCH: Any = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]

# In Python's place: writes down what is asked of `apb bench`, which fails for "decode", and does all else.
STAND_IN = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
if arguments[2:3] != ["bench"]:
    os.execv("{python}", ["{python}", *arguments])
with open("{log}", "a") as log:
    log.write(json.dumps(arguments[3:]) + "\\n")
if "decode" in arguments:
    sys.exit(1)
value = lambda name: arguments[arguments.index(name) + 1]
lengths = [int(b) for a, b in zip(arguments, arguments[1:]) if a == "--length"]
strategies = [b for a, b in zip(arguments, arguments[1:]) if a == "--strategy"]
row = dict(seconds=1.0, floor_seconds=0.5, predicted_seconds=0.9, peak_bytes=1, parts=None, note=None, backend="torch")
blocks = int(value("--blocks")) if "--blocks" in arguments else 1
rows = [row | dict(strategy=s, length=n, plan=dict(blocks=blocks)) for n in lengths for s in strategies]
facts = dict(device="d", dtype="x", torch="t", transformers="t")
layers = 1 if "--layers" in arguments else 32
report = dict(model="m", layers=layers, ranks=int(value("--ranks")), fingerprint=facts, rows=rows)
json.dump(report, open(value("--out"), "w"))
"""


class Table:
    """The script in a folder of its own, with the stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.out, self.log, self.python = folder / "out", folder / "log", folder / "python"
        self.python.write_text(STAND_IN.format(python=sys.executable, log=self.log))
        self.python.chmod(0o755)

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "benchmarks" / "paper_table.sh"), *map(str, arguments)]
        environment = {**os.environ, "PYTHON": str(self.python), **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    @property
    def asked(self) -> list[dict[str, list[str]]]:
        """Every call of `apb bench`: its options, which must be options that there are, with their values."""
        calls = []
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            what, *rest = json.loads(line)
            options: dict[str, list[str]] = {"": [what]}
            for name, value in zip(rest[::2], rest[1::2], strict=True):
                options.setdefault(name, []).append(value)
            known = {name for parameter in BENCH.commands[what].params for name in parameter.opts}
            assert options.keys() - {""} <= known
            calls.append(options)
        return calls


@pytest.fixture
def table(tmp_path: Path) -> Table:
    if not shutil.which("timeout") or not shutil.which("bash"):
        # The script under test is one for bash and GNU's tools, as on the machines that have such GPUs.
        pytest.skip("bash and timeout (coreutils) are needed")
    return Table(tmp_path)


def test_eight_ranks(table: Table) -> None:
    """All strategies at all lengths, the paper's eight blocks and more, decode, one layer of full; a part that fails
    is named, and the tables are of the others."""
    done = table(table.out, 8)
    assert done.returncode == 0, done.stderr
    short, long, decode, blocks, layer, last = table.asked
    assert short["--strategy"] == ["full", "apb", "star", "ring", "ulysses"]
    assert short["--length"] == ["32768", "65536", "131072"]
    assert (long["--strategy"], long["--length"]) == (["apb", "star", "ring", "ulysses"], ["262144", "524288"])
    assert (decode[""], decode["--length"]) == (["decode"], ["32768", "131072"])
    assert (blocks["--blocks"], blocks["--length"]) == (["32"], ["131072", "262144", "524288"])
    assert (layer["--layers"], layer["--ranks"], layer["--strategy"]) == (["1"], ["1"], ["full"])
    assert (last["--length"], last["--anchor-length"], last["--passing-length"]) == (["1048576"], ["4096"], ["2048"])
    for call in (short, long, decode, last):
        assert (call["--ranks"], call["--blocks"]) == (["8"], ["8"])
        assert call["--random-weights"] == ["llama-3.1-8b"]
    assert "Part decode: stopped (status 1)" in done.stderr
    text = (table.out / "paper_8gpu.md").read_text()
    assert "| tokens | 32,768 | 65,536 | 131,072 | 262,144 | 524,288 | 1,048,576 |" in text
    assert "| full, 1 of 32 layers scaled up | - | - | - | 32.000 | 32.000 | - |" in text
    assert "| apb, 32 blocks | - | - | 1.000 | 1.000 | 1.000 | - |" in text
    assert (table.out / "paper_8gpu_seconds.svg").exists()
    assert (table.out / "paper_8gpu.html").exists()


def test_one_rank_and_many(table: Table) -> None:
    """On one, ring and ulysses are full attention; on sixteen, there are as many blocks, and few lengths for more."""
    done = table(table.out, 1, PARTS="short 1m")
    assert "ring and ulysses are full attention" in done.stderr
    assert [call["--strategy"] for call in table.asked] == [["full", "apb", "star"], ["apb", "star"]]
    table.log.unlink()
    table(table.out, 16, PARTS="long blocks")
    long, blocks = table.asked
    assert long["--blocks"] == ["16"]
    assert (blocks["--blocks"], blocks["--length"]) == (["64"], ["262144", "524288"])
    table.log.unlink()
    done = table(table.out, 64, PARTS="blocks short")
    assert "Part blocks: left out, its blocks would be shorter than 4K." in done.stderr
    assert [call["--blocks"] for call in table.asked] == [["64"]]


def test_smaller(table: Table) -> None:
    """A checkpoint and shorter lengths, for a try without GPUs: no part that needs random weights."""
    done = table(table.out, 2, MODEL="models/needle", DIVIDE="64")
    assert "Part layer: left out" in done.stderr
    assert [call["--model"] for call in table.asked] == [["models/needle"]] * 5
    assert table.asked[0]["--length"] == ["512", "1024", "2048"]
    assert table.asked[-1]["--anchor-length"] == ["64"]


def test_a_second_call_goes_on(table: Table) -> None:
    """Parts that had no time are named; asked for alone they join the earlier ones in the tables."""
    done = table(table.out, 8, LIMIT="0")
    assert done.returncode == 1
    assert done.stderr.count("seconds are left for it") == 6
    assert "Nothing was measured" in done.stderr
    assert table.asked == []
    table(table.out, 8, PARTS="short")
    table(table.out, 8, PARTS="1m")
    assert "32,768 | 65,536 | 131,072 | 1,048,576 |" in (table.out / "paper_8gpu.md").read_text()


def test_what_cannot_be_run(table: Table) -> None:
    """No GPU and no number of ranks, and parts that there are not: one sentence and status 2."""
    for arguments, environment, words in (
        ((table.out,), {"CUDA_VISIBLE_DEVICES": ""}, "say how many ranks"),
        ((table.out, "two"), {}, "'two' GPUs"),
        ((table.out, 2), {"PARTS": "short tall"}, "Unknown part tall; choose of: short long"),
    ):
        done = table(*arguments, **environment)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert table.asked == []
