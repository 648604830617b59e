"""The best of the pairs that blocks offer, one block after the other: against sorted lists of all of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.strategies.contest import Contest


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(0, 3),
    st.integers(0, 2),
    st.randoms(use_true_random=False),
)
def test_the_best_of_all_that_was_offered(offers, budget, edge, anchor, random) -> None:
    """After every block: the end of the last one, then the best of all others by score, of equal ones the earlier."""
    edge = min(edge, budget)
    total = anchor + sum(offers)
    scores = [[random.randrange(5) / 4 for _ in range(total)] for _ in range(2)]
    contest = Contest(torch.tensor(scores).reshape(2, total), budget, range(anchor, anchor))
    stop = anchor
    for count in offers:
        first, stop = stop, stop + count
        last = min(edge, count)
        if last < edge:  # what a shorter edge lets in may have lost to a longer one
            return
        contest.add(range(first, stop), last)
        for head, row in enumerate(scores):
            found = list(range(anchor, stop))
            if len(found) > budget:
                end = found[len(found) - last :]
                others = sorted(found[: len(found) - last], key=lambda column: (-row[column], column))
                found = sorted(others[: budget - last] + end)
            assert contest.columns[head].tolist() == found
            assert contest.scores[head].tolist() == [row[column] for column in found]
        assert contest.dropped == (stop - anchor > budget)


def test_what_is_kept_for_later_rounds() -> None:
    """The columns before all that compete and those that are there; everything, untouched, while all fits."""
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0], [9.0, 3.0, 2.0, 4.0]])
    pairs = torch.arange(2.0 * 2 * 4 * 3).view(2, 2, 4, 3)
    contest = Contest(scores, 2, range(1, 2))
    contest.add(range(2, 3), 0)
    assert contest.kept(pairs) is pairs
    contest.add(range(3, 4), 0)
    kept = contest.kept(pairs)
    assert torch.equal(kept[:, 0], pairs[:, 0, [0, 2, 3]])
    assert torch.equal(kept[:, 1], pairs[:, 1, [0, 1, 3]])
