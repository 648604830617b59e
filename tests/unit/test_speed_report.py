"""`apb report` of what `apb bench` wrote: files of several lengths as one table, one way to read as one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from command_line import Cli

PARTS = ("qkv", "scoring", "selection", "communication", "attention", "output", "mlp", "other")


def row(strategy: str, length: int, seconds: float | None, blocks: int = 1, note: str | None = None) -> dict[str, Any]:
    """One strategy at one length, its parts an eighth of the seconds each."""
    return {
        "strategy": strategy,
        "length": length,
        "plan": {"blocks": blocks},
        "backend": "torch",
        "seconds": seconds,
        "floor_seconds": 0.5,
        "predicted_seconds": 1.5,
        "peak_bytes": 3 * 2**30,
        "parts": None if seconds is None else dict.fromkeys(PARTS, seconds / 8),
        "note": note,
    }


def written(path: Path, *rows: dict[str, Any], **facts: Any) -> Path:
    fingerprint = {"device": "H<1>", "dtype": "bfloat16", "torch": "2.11", "transformers": "5.17"}
    report = {"model": "m", "layers": 32, "ranks": 8, "fingerprint": fingerprint, "rows": list(rows)}
    path.write_text(json.dumps(report | facts))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two lengths on eight ranks, apb in two ways at the longer one, full too long there, one of its layers, decode."""
    step = {"length": 1024, "graph": True, "seconds": 0.01, "tokens_per_s": 100.0, "limit_seconds": 0.0075}
    step |= {"of_limit": 0.75, "peak_bytes": 2**31}
    return [
        written(tmp_path / "short.json", row("full", 1024, 4.0), row("ring", 1024, 1.0, 16), row("apb", 1024, 0.5, 8)),
        written(tmp_path / "long.json", row("full", 2048, None, note="left out: too long"), row("apb", 2048, 2.0, 8)),
        written(
            tmp_path / "blocks.json", row("apb", 2048, 1.0, 32), row("ulysses", 2048, None, note="no") | {"plan": {}}
        ),
        written(tmp_path / "layer.json", row("full", 2048, 0.25), layers=1, ranks=1),
        written(tmp_path / "decode.json", step, step | {"graph": False, "sessions": 4, "together": True}),
    ]


def test_tables_by_hand(cli: Cli, files: list[Path], tmp_path: Path) -> None:
    """Seconds, tokens per second, ratios to full attention, a layer's milliseconds; what is left out is said."""
    out = tmp_path / "table.md"
    assert cli("report", *files, "--out", out).status == 0
    text = out.read_text()
    tables = {part.split("\n", 1)[0]: part for part in text.split("\n## ")}
    assert "| tokens | 1,024 | 2,048 |" in tables["Seconds of prefill"]
    assert "| full | 4.000 | - |" in tables["Seconds of prefill"]
    assert "| ring | 1.000 | - |" in tables["Seconds of prefill"]
    assert "| apb, 8 blocks | 0.500 | 2.000 |" in tables["Seconds of prefill"]
    assert "| apb, 32 blocks | - | 1.000 |" in tables["Seconds of prefill"]
    assert "| full, 1 of 32 layers scaled up | - | 8.000 |" in tables["Seconds of prefill"]
    assert "| apb, 8 blocks | 2,048 | 1,024 |" in tables["Tokens per second"]
    ratios = tables["Times as fast as full attention on one device"]
    assert "| apb, 8 blocks | 8.00 | 4.00 |" in ratios
    assert "| apb, 32 blocks | - | 8.00 |" in ratios
    assert "| apb, 8 blocks | 100% (+200%) | 25% (-25%) |" in tables["Of floor (prediction)"]
    assert "| full, 1 of 32 layers scaled up | - | - |" in tables["Peak memory of a rank, GiB"]
    layer = tables["A layer at 2,048 tokens"]
    assert "| apb, 8 blocks |" + " 7.81 |" * 8 + " 62.50 |" in layer
    assert "| full, 1 of 32 layers scaled up |" + " 31.25 |" * 8 + " 250.00 |" in layer
    assert "| 1,024 | 8 | exact | 1 | yes | 100.0 | 10.00 | 7.50 | 75% | 2.0 |" in tables["Decode"]
    assert "| 1,024 | 8 | exact | 4 in one pass | no | 100.0 |" in tables["Decode"]
    assert "full at 2,048: left out: too long." in tables["Notes"]
    assert "ulysses at 2,048: no." in tables["Notes"]
    assert "seconds of 1 layers times 32" in tables["Notes"]


def test_plots_beside_the_table(cli: Cli, files: list[Path], tmp_path: Path) -> None:
    """Two SVG files that the Markdown shows: a line for every way to read, a field of bars for every length."""
    out = tmp_path / "table.md"
    cli("report", *files, "--out", out)
    shown = re.findall(r"!\[.*?\]\((.*?)\)", out.read_text())
    assert shown == ["table_seconds.svg", "table_parts.svg"]
    for name in shown:
        root = ElementTree.parse(tmp_path / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        fields = [each.get("id", "") for each in root.iter() if re.fullmatch(r"axes_\d+", each.get("id", ""))]
        assert len(fields) == (1 if "seconds" in name else 2)
    page = tmp_path / "page.html"
    assert cli("report", *files, "--out", page).status == 0
    assert page.read_text().count("<svg") == 2
    assert "H&lt;1&gt;" in page.read_text()
    assert "H<1>" not in page.read_text()


def test_ranks_tell_runs_apart(cli: Cli, tmp_path: Path) -> None:
    """One machine on two and on eight ranks: full attention is one device's on both."""
    two = written(tmp_path / "2.json", row("full", 1024, 4.0), row("ring", 1024, 2.5, 4), ranks=2)
    eight = written(tmp_path / "8.json", row("full", 1024, 4.2), row("ring", 1024, 1.0, 16))
    out = tmp_path / "table.md"
    assert cli("report", two, eight, "--out", out).status == 0
    for line in ("| full | 4.200 |", "| ring, 2 ranks | 2.500 |", "| ring, 8 ranks | 1.000 |"):
        assert line in out.read_text()


def test_reports_that_cannot_be_made(cli: Cli, files: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Other files, several models, both kinds at once; without matplotlib Markdown has tables and says so."""
    out = tmp_path / "table.md"
    cli("report", tmp_path / "no.json", "--out", out).refused("no.json", "cannot be read")
    other = tmp_path / "other.json"
    for text in ("{", "[1]", '{"rows": []}', json.dumps(json.loads(files[0].read_text()) | {"rows": [{"a": 1}]})):
        other.write_text(text)
        cli("report", other, "--out", out).refused("other.json", "not a result file of apb bench")
    whole = json.loads(files[0].read_text())
    senseless = ({"seconds": "fast"}, {"parts": {"mlp": "x"}}, {"plan": None}, {"length": "long"})
    reports = [whole | {"rows": [whole["rows"][0] | wrong]} for wrong in senseless]
    for report in (*reports, whole | {"layers": 0}, whole | {"ranks": "two"}, whole | {"fingerprint": "H1"}):
        other.write_text(json.dumps(report))
        cli("report", other, "--out", out).refused("other.json", "not a result file of apb bench")
    written(other, row("full", 1024, 1.0), model="another")
    cli("report", files[0], other, "--out", out).refused("several models", "m and another")
    cli("report", files[0], tmp_path / "answers.jsonl", "--out", out).refused("not both")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli("report", files[0], "--out", tmp_path / "page.html").refused("matplotlib", "apb-llm[report]")
    done = cli("report", files[0], "--out", out)
    assert done.status == 0
    assert "no plots: Plots need matplotlib" in done.err
    assert "| full | 4.000 |" in out.read_text()
