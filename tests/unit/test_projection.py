"""`apb plan --ceilings`: seconds of machines that were not there, from measured rates, each with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apb.cost import KNOWN_CEILINGS
from command_line import Cli

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
    for text in ("{", "[]", '{"copy_bandwidth": 1.0, "rows": []}', json.dumps(run | {"ceilings": {"linear": "fast"}})):
        path.write_text(text)
        cli(*PLAN, "--ceilings", path).refused("prefill.json", "holds no ceilings", "apb bench prefill --out")
    zero = run | {"ceilings": run["ceilings"] | {"linear": 0.0}}
    cli(*PLAN, "--ceilings", written(zero, tmp_path)).refused("not all above 0")
    unknown = run | {"fingerprint": {"device": "Abacus", "dtype": "float32"}}
    cli(*PLAN, "--ceilings", written(unknown, tmp_path), "--ranks", 2).refused("unknown", "one rank", "two or more")
    assert cli(*PLAN, "--ceilings", path, "--ranks", 1).json["projection"] is False
    cli(*PLAN, "--network-gbit", "0").refused("--network-gbit", "above 0")
    cli(*PLAN, "--ranks-per-host", "0").refused("Ranks per host", "at least 1")
    cli(*PLAN, "--model", "models/needle").refused("not both")
    cli(*PLAN[:3], "--random-weights", "gpt-9").refused("Unknown model shape 'gpt-9'")
