"""Reports: the numbers they show, and that a real browser shows them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from answers import record, run_of
from apb.evaluation.records import write_records
from browser import CHROMIUM, FLAGS
from command_line import Cli


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two lengths of two tasks, read in three ways; names that HTML must escape."""
    path = tmp_path / "results.jsonl.gz"
    records = []
    for length in (4096, 16384):
        for strategy, lost, seconds in (("full", 0, 2.0), ("star", 30, 1.0)):
            scores = {"a<b": [100.0] * (50 - lost) + [0.0] * lost, "b": [100.0] * 50}
            records += run_of(strategy, scores, length=length, prefill_s=seconds)
        asked = {"strategy": "apb", "compressor": "query", "blocks": 4}
        records += [
            record("b", number, 100, "apb", length=length, compressor="query", blocks=4, asked=asked)
            for number in range(50)
        ]
    write_records(path, records)
    return path


def test_markdown_has_the_numbers(cli: Cli, results: Path, tmp_path: Path) -> None:
    """Scores with Wilson's intervals, averages only of whole rows, paired differences, speeds."""
    path = tmp_path / "report.md"
    assert cli("report", results, "--out", path).status == 0
    text = path.read_text()
    assert "500 answers of m, float32, on d, from results.jsonl.gz." in text
    assert text.count("| 50 samples | a<b | b | average |") == 2
    assert "| full | 100.0 (92.9 to 100.0) | 100.0 (92.9 to 100.0) | 100.0 |" in text
    assert "| star | 40.0 (27.6 to 53.8) | 100.0 (92.9 to 100.0) | 70.0 |" in text
    assert "| apb, query, 4 blocks |  | 100.0 (92.9 to 100.0) |  |" in text
    assert re.search(r"\| star \| -60\.0 \(-7\d\.\d to -4\d\.\d, 30/50\) \| \+0\.0 .*\| -30\.0 .* 30/100\) \|", text)
    assert "| star | 4,000 (n 100) | 4,000 (n 100) |" in text


def test_page_in_a_browser(cli: Cli, results: Path, tmp_path: Path) -> None:
    """One file with tables and plots inside, which a browser lays out and paints."""
    page = tmp_path / "report.html"
    assert cli("report", results, "--out", page).status == 0
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"'](?!#)", text)  # nothing is loaded from elsewhere
    assert "a<b" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    again = tmp_path / "again.html"
    cli("report", results, "--out", again)
    assert again.read_text() == text
    if CHROMIUM is None:
        # A browser is no Python package: nothing here can install it. All that goes without has been checked.
        pytest.skip("no Chromium is installed here: the page was made, but not opened")

    def browse(*options: str) -> str:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        return done.stdout.decode()

    dom = browse("--dump-dom")
    assert dom.count("<svg") == 5
    assert dom.count("<table") == 7  # averages, scores and differences for either length; seconds
    assert len(re.findall(r'<td class="worse">-\d+\.\d<small>', dom)) == 4
    assert "a&lt;b" in dom
    picture = tmp_path / "report.png"
    browse(f"--screenshot={picture}", "--window-size=1200,3000")
    from PIL import Image

    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xFD, 0xEC, 0xEA)} <= colours


def test_reports_that_cannot_be_made(cli: Cli, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    page = tmp_path / "report.html"
    cli("report", empty, "--out", page).refused("no answers", "empty.jsonl")
    cli("report", tmp_path / "nowhere.jsonl", "--out", page).refused("nowhere.jsonl")
    cli("report", results, "--out", tmp_path / "report.pdf").refused("report.pdf", ".html or .md")
    cli("report", results, "--out", tmp_path / "no" / "report.md").refused("report.md")
    empty.write_text('{"a": 1}\n')
    cli("report", empty, "--out", page).refused("Line 1", "empty.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli("report", results, "--out", page).refused("matplotlib", "apb-llm[report]")
