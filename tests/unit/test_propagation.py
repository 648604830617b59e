"""Propagation on one rank: against the dense oracle, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import apb
import propagated
from families import PROMPT


@pytest.mark.parametrize(("name", "reading"), propagated.CASES)
def test_against_the_oracle(name: str, reading: str) -> None:
    """The rows that go on, logits, and decode over a cache of uneven layers are those of one dense masked softmax."""
    logits, positions = propagated.expected(name, reading)
    outcome = propagated.read(name, reading)
    assert outcome.positions == positions
    assert outcome.lengths == (len(PROMPT), len(positions))
    assert outcome.keys is not None and outcome.keys.shape[1] == len(positions)
    torch.testing.assert_close(outcome.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reading", propagated.READINGS)
def test_keeping_all_changes_nothing(reading: str) -> None:
    """With keep=1.0 every strategy gives what it gives without propagation."""
    kept = propagated.read("qwen3", reading, propagation=apb.Propagation(propagated.LAYER, 1.0))
    without = propagated.read("qwen3", reading, propagation=None)
    torch.testing.assert_close(kept.logits, without.logits, rtol=1e-4, atol=1e-4)
    assert kept.positions == without.positions == list(range(len(PROMPT)))
