"""Propagation on 1 to 4 ranks: the same rows go on, dealt evenly, and the numbers are the dense oracle's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import propagated
import propagation_work
from families import PROMPT
from forked import launch
from propagated import KEEP, Outcome
from propagation_work import SIZES, cases, readings

# All ranks' work is done before the first test, which is charged for it.
pytestmark = pytest.mark.timeout(900)
Outcomes = list[dict[Any, Outcome]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What each of four ranks saw, in the groups that it was in."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(propagation_work.everything, max(SIZES), str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(max(SIZES))]


@pytest.mark.parametrize(("size", "name", "reading"), [(n, *case) for n in SIZES for case in cases(n)])
def test_against_the_oracle(outcomes: Outcomes, size: int, name: str, reading: str) -> None:
    """Fewer and more blocks than ranks, rounds, windows: rows, logits and decode, alike on all ranks."""
    logits, positions = propagated.expected(name, reading)
    for rank in range(size):
        outcome = outcomes[rank][size, name, reading, KEEP]
        assert outcome.positions == positions
        torch.testing.assert_close(outcome.logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(outcome.logits, outcomes[0][size, name, reading, KEEP].logits)
        torch.testing.assert_close(
            outcomes[0][size, name, reading, KEEP].keys, outcomes[0][1, name, reading, KEEP].keys, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("size", "reading"), [(n, name) for n in SIZES for kind, name in cases(n) if kind == "qwen3"])
def test_rows_are_dealt_evenly(outcomes: Outcomes, size: int, reading: str) -> None:
    """Whoever read them, every rank takes as many of the rows that go on as the others, up to two chunks' rounding."""
    tail = len(PROMPT.query)
    above = [outcomes[rank][size, "qwen3", reading, KEEP].lengths[1] for rank in range(size)]
    above[-1] -= tail
    assert sum(above) == len(PROMPT.prefix) + propagated.COUNT
    # The prefix comes on top, with the first chunk.
    assert max(above) - min(above) <= len(PROMPT.prefix) + 2


@pytest.mark.parametrize("size", SIZES)
def test_documents_on_disk(outcomes: Outcomes, size: int) -> None:
    """Written by fewer ranks than read them: each layer has what it saw, windows included."""
    logits, _ = propagated.expected(*propagation_work.STORED)
    for rank in range(size):
        torch.testing.assert_close(outcomes[rank][size, "stored"], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "reading"), [(n, name) for n in SIZES for name in readings(n)])
def test_keeping_all_changes_nothing(outcomes: Outcomes, size: int, reading: str) -> None:
    """With keep=1.0 every strategy gives on any number of ranks what it gives there without propagation."""
    kept, without = (outcomes[0][size, "qwen3", reading, keep].logits for keep in (1.0, None))
    torch.testing.assert_close(kept, without, rtol=1e-4, atol=1e-4)
