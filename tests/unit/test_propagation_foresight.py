"""benchmarks/propagation_foresight.py: rank correlations, on cases counted by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import propagation_foresight
from propagation_foresight import correlation, correlations


def rows(*cells: tuple[str, int, float, float]) -> list[dict[str, object]]:
    """Rows of (prompt, layer, held, nats); what is lost of the score is the same."""
    return [
        {"task": "x", "sample": name, "layer": layer, "share": 0.1, "held": held, "nats": lost, "points": lost,
         "all_rows": 100.0}
        for name, layer, held, lost in cells
    ]  # fmt: skip


def test_ranks_of_each_group() -> None:
    """Equal losses share a rank; groups are ranked apart; one in which nothing differs is left out."""
    first = rows(("a", 1, 0.1, 2.0), ("a", 2, 0.2, 1.0), ("a", 3, 0.3, 1.0))
    assert correlation(first, "nats", lambda row: 0) == pytest.approx(-1.5 / math.sqrt(2 * 1.5))
    same = rows(("b", 1, 0.9, 5.0), ("b", 2, 0.8, 5.0))
    other = rows(("c", 1, 0.7, 7.0), ("c", 2, 0.6, 8.0))
    apart = correlation([*first, *same, *other], "nats", lambda row: row["sample"])
    assert apart == pytest.approx((-1.5 - 0.5) / math.sqrt(2.5 * 2))
    assert math.isnan(correlation(same, "nats", lambda row: 0))


def test_intervals_are_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within each prompt the order is the other way round, so every resample says -1; prompts that all rows get wrong
    have no score to lose."""
    monkeypatch.setattr(propagation_foresight, "DRAWS", 50)
    places = [(layer, shift) for shift in range(4) for layer in (1, 2, 3)]
    found = rows(*(("abcd"[shift], layer, layer + shift, shift / 8 - layer) for layer, shift in places))
    found += [row | {"sample": "wrong", "all_rows": 0.0} for row in rows(("", 1, 0.1, 0.1), ("", 2, 0.2, 0.2))]
    told = {(each["lost"], each["ranked"]): each for each in correlations(found)}
    one = told["points", "layers and shares of one prompt"]
    assert (one["prompts"], one["correlation"], one["interval"]) == (4, pytest.approx(-1), pytest.approx([-1, -1]))
    assert told["nats", "layers and shares of one prompt"]["prompts"] == 5
    assert told["points", "everything"]["correlation"] > -1
