"""`apb plan --ceilings`: seconds of machines that were not there, from measured rates, each with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apb.hf.counting import model_shape
from apb.hf.random_weights import shape_config
from apb.planning.cost import KNOWN_CEILINGS, Ceilings, predict
from apb.planning.methods import METHODS
from apb.planning.plan import Plan
from command_line import Cli, script

PLAN = ("plan", "--length", 100_000, "--random-weights", "llama-3.1-8b", "--json")


@pytest.fixture
def run() -> dict[str, Any]:
    """What `apb bench prefill` writes, as far as it counts here: one H200."""
    rates = {"linear": 8e14, "attention": 7e14, "link": 0.0, "memory": 4e12}
    facts = {"device": "NVIDIA H200", "dtype": "bfloat16"}
    return {"ranks": 1, "tensor_parallel": 1, "fingerprint": facts, "ceilings": rates, "rows": []}


def written(run: Any, folder: Path) -> Path:
    path = folder / "prefill.json"
    path.write_text(json.dumps(run))
    return path


def test_a_projection_from_one_device(cli: Cli, run: dict[str, Any], tmp_path: Path) -> None:
    """Its own rates, the link known of two such devices, the network as asked; seconds follow from the ranks' bytes."""
    path = written(run, tmp_path)
    report = cli(*PLAN, "--ceilings", path, "--ranks", 16, "--network-gbit", 200).json
    link = KNOWN_CEILINGS["NVIDIA H200"].link
    assert report["projection"] is True
    sources = report["ceilings"].pop("sources")
    assert report["ceilings"] == run["ceilings"] | {"link": link, "network": 25e9}
    assert "measured in prefill.json (1 x NVIDIA H200, bfloat16)" in sources["linear"]
    assert sources["linear"] == sources["attention"] == sources["memory"]
    assert "two NVIDIA H200 in another run" in sources["link"]
    assert sources["network"] == "assumed: 200 Gbit/s, an adapter for each device"
    for row in report["strategies"]:
        expected, hidden = [], []
        for rank in row["per_rank"]:
            others = rank["linear_flops"] / 8e14 + rank["moved_bytes"] / 4e12
            attention = (rank["attention_flops"] + rank["scoring_flops"]) / 7e14
            sending = max((rank["sent_bytes"] - rank["network_bytes"]) / link, rank["network_bytes"] / 25e9)
            expected.append(others + attention + sending)
            hidden.append(others + max(attention, sending))
        assert row["seconds"] == pytest.approx(max(expected))
        overlaps = row["strategy"] in ("apb", "ring")
        assert row["hidden_seconds"] == pytest.approx(max(hidden) if overlaps else max(expected))
        assert (row["network_bytes_per_rank"] > 0) is (row["plan"]["ranks"] > 1)


def test_a_run_on_two_gives_the_link(cli: Cli, run: dict[str, Any], tmp_path: Path) -> None:
    """Its own rate between ranks; on as many ranks as it had seconds are no projection; hosts of eight hold eight."""
    run["ranks"], run["ceilings"]["link"] = 2, 3e11
    path = written(run, tmp_path)
    report = cli(*PLAN, "--ceilings", path, "--ranks", 2).json
    assert report["projection"] is False
    assert report["ceilings"]["link"] == 3e11
    assert "2 x NVIDIA H200" in report["ceilings"]["sources"]["link"]
    report = cli(*PLAN, "--ceilings", path, "--ranks", 8).json
    assert report["projection"] is True
    assert {row["network_bytes_per_rank"] for row in report["strategies"]} == {0}
    report = cli(*PLAN, "--ceilings", path, "--ranks", 8, "--ranks-per-host", 4).json
    assert min(row["network_bytes_per_rank"] for row in report["strategies"] if row["plan"]["ranks"] > 1) > 0


def test_the_table_says_that_it_projects(cli: Cli, run: dict[str, Any], tmp_path: Path) -> None:
    """In the row of the seconds, in a sentence, and with every rate's source."""
    done = cli(*PLAN[:-1], "--ceilings", written(run, tmp_path), "--ranks", 8)
    assert done.status == 0
    for words in ("seconds, projection", "with sends hidden", "not a measurement", "800 TFLOP/s", "in another run"):
        assert words in done.out
    assert "assumed: 400 Gbit/s" in " ".join(done.out.split())


def test_ceilings_that_cannot_be_used(cli: Cli, run: dict[str, Any], tmp_path: Path) -> None:
    """Files that are missing, broken, of something else, or without a rate that is needed; senseless networks."""
    path = tmp_path / "prefill.json"
    cli(*PLAN, "--ceilings", path).refused("prefill.json", "cannot be read")
    for text in (
        "{",
        "[]",
        '{"copy_bandwidth": 1.0, "rows": []}',
        json.dumps(run | {"ceilings": {"linear": "fast"}}),
        json.dumps(run | {"tensor_parallel": "two"}),
    ):
        path.write_text(text)
        cli(*PLAN, "--ceilings", path).refused("prefill.json", "holds no ceilings", "apb bench prefill --out")
    for senseless in (0.0, float("inf")):
        given = run | {"ceilings": run["ceilings"] | {"linear": senseless}}
        cli(*PLAN, "--ceilings", written(given, tmp_path)).refused("not all finite and above 0")
    unnamed = run | {"fingerprint": run["fingerprint"] | {"device": ["H1"]}}
    cli(*PLAN, "--ceilings", written(unnamed, tmp_path)).refused("holds no ceilings")
    unknown = run | {"fingerprint": {"device": "Abacus", "dtype": "float32"}}
    cli(*PLAN, "--ceilings", written(unknown, tmp_path), "--ranks", 2).refused("unknown", "one rank", "two or more")
    assert cli(*PLAN, "--ceilings", path, "--ranks", 1).json["projection"] is False
    cli(*PLAN, "--network-gbit", "0").refused("--network-gbit", "above 0")
    cli(*PLAN, "--ranks-per-host", "0").refused("Ranks per host", "at least 1")
    cli(*PLAN, "--model", "models/needle").refused("not both")
    cli(*PLAN[:3], "--random-weights", "gpt-9").refused("Unknown model shape 'gpt-9'")


def test_the_table_of_a_run(run: dict[str, Any], tmp_path: Path) -> None:
    """benchmarks/projection.py: every strategy and length on 8, 16 and 64 GPUs, with what was measured beside it."""
    run |= {"model": "llama-3.1-8b", "layers": 32}
    run["fingerprint"] |= {"torch": "2.11", "transformers": "5.17"}
    full = {"strategy": "full", "length": 131072, "plan": {"blocks": 1}, "backend": "torch", "seconds": 11.0}
    full |= {"floor_seconds": 8.0, "predicted_seconds": 10.0, "peak_bytes": 1, "parts": None, "note": None}
    run["rows"] = [full]
    one = written(run, tmp_path)
    eight = tmp_path / "eight.json"
    star = full | {"strategy": "star", "plan": {"blocks": 8}, "seconds": 1.5}
    eight.write_text(json.dumps(run | {"ranks": 8, "rows": [star]}))
    out = tmp_path / "projection.json"
    program = Path(__file__).parents[2] / "benchmarks" / "projection.py"
    assert script(program, one, "--out", out, "--measured", one, eight) is None
    report = json.loads(out.read_text())
    rows = {(row["gpus"], row["strategy"], row["length"], row["more_blocks"]): row for row in report["rows"]}
    lengths = [32768, 65536, 131072, 262144, 524288, 1048576]
    assert {key[:3] for key in rows} == {
        (gpus, strategy, length)
        for gpus in (8, 16, 64)
        for strategy in METHODS
        for length in lengths
        if strategy != "ulysses" or gpus < 64  # of 32 heads
    }
    shape = model_shape(shape_config("llama-3.1-8b"))
    rates = Ceilings(8e14, 7e14, KNOWN_CEILINGS["NVIDIA H200"].link, 4e12, 50e9)
    plan = Plan.build(1, 131072 - 33, 32, ranks=16, strategy="ring")
    row = rows[16, "ring", 131072, False]
    assert row["seconds"] == pytest.approx(predict(plan, shape, ranks_per_host=8).seconds(rates))
    assert rows[8, "apb", 131072, True]["plan"]["blocks"] == 32
    assert rows[8, "full", 131072, False]["measured_seconds"] == 11.0
    assert rows[8, "star", 131072, False]["measured_seconds"] == 1.5
    assert rows[16, "star", 131072, False]["measured_seconds"] is None
    text = out.with_suffix(".md").read_text()
    for words in (
        "**A projection, not a measurement.**",
        "| full | 131,072 | 1 | 11.00 | 10.00 | 1.10 |",
        "another run: prefill.json is of one rank",
        "## 64 GPUs, 8 hosts",
        "(measured 1.5)",
    ):
        assert words in text
    unknown = run | {"fingerprint": run["fingerprint"] | {"device": "Abacus"}}
    assert "unknown" in str(script(program, written(unknown, tmp_path), "--out", out))
