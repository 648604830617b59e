"""`--propagate` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apb.benchmarks import ceilings
from apb.planning.cost import Ceilings
from command_line import Cli

TEXT = "The lighthouse keeper of Orrin was called Maud. " * 12


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_generate(cli: Cli, checkpoint: Path, document: Path) -> None:
    """JSON tells what went on, and nothing where all did."""
    given = ("generate", "--document", document, "--query", "Who?", "--model", checkpoint, "--device", "cpu", "--json")
    found = cli(*given, "--strategy", "full", "--propagate", "25%").json
    assert found["propagation"] == {"layer": found["propagation"]["layer"], "rows": 144, "share": 0.25}
    assert found["exact"] is False
    assert "propagation" not in cli(*given, "--propagate", "off").json
    cli(*given, "--propagate", "2").refused("above 0 and at most 1")
    cli(*given, "--propagate", "half").refused("--propagate takes a share")
    cli(*given, "--propagate", "0.2@99").refused("Layer 99")


def test_documents_on_disk(cli: Cli, checkpoint: Path, document: Path, tmp_path: Path) -> None:
    """They answer the question that they were read for; without one they are refused before anything is read."""
    given: Any = ("read", "--document", document, "--out", tmp_path / "store", "--model", checkpoint, "--device", "cpu")
    cli(*given, "--propagate", "auto").refused("give the question")
    assert "rows above layer" in cli(*given, "--question", "Who?", "--propagate", "auto").err
    asked = cli("ask", tmp_path / "store", "--query", "Who?", "--device", "cpu", "--max-new-tokens", 1, "--json").json
    assert (asked["read_for"], asked["exact"]) == ("this question", False)
    cli("ask", tmp_path / "store", "--query", "Where?", "--device", "cpu").refused("read it anew for this one")


def test_plan(cli: Cli, checkpoint: Path) -> None:
    """Every strategy costs less by it, on several ranks too, and its row tells it."""
    given = ("plan", "--length", 100_000, "--ranks", 4, "--model", checkpoint, "--json")
    rows = [cli(*given, *more).json["strategies"] for more in ((), ("--propagate", "0.2"))]
    for without, row in zip(*rows, strict=True):
        assert row["propagation"]["rows"] == 20_000
        assert row["exact"] is False
        for figure in ("linear_flops", "attention_flops", "cache_bytes_per_rank"):
            assert row[figure] < without[figure]


def test_bench(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run measures a strategy with it and without, and tells the rows apart."""
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_: Ceilings(1e11, 1e11, 0.0, 1e10))
    given = ("bench", "prefill", "--length", 200, "--model", checkpoint, "--device", "cpu", "--strategy", "full")
    report = cli(*given, "--repeat", 1, "--propagate", "off", "--propagate", "0.2", "--json").json
    without, row = report["rows"]
    assert without["propagation"] is None
    assert row["propagation"]["rows"] == 33
    assert (without["exact"], row["exact"], without["speedup"]) == (True, False, None)
    assert row["speedup"] > 0


def test_eval(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Each value is a reading of its own."""
    given = ("eval", "synthetic", "--task", "single", "--length", 900, "--samples", 1, "--model", checkpoint)
    more = ("--strategy", "full", "--propagate", "off", "--propagate", "0.2", "--device", "cpu", "--json")
    assert len(cli(*given, *more).json["results"]) == 2
