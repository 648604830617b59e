"""The best of the pairs that earlier blocks offer, for every block: against sorted lists of all of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.strategies.contest import Contest, kept


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_the_best_of_all_that_was_offered(blocks, budget, random) -> None:
    """Of every block: the end of what is offered, then the best of all others by score, of equal ones the earlier."""
    blocks = [(budget + more, min(edge, budget)) for more, edge in blocks]
    total = max(end for end, _ in blocks)
    scores = [[random.randrange(5) / 4 for _ in range(total)] for _ in range(2)]
    contest = Contest(tuple(range(len(blocks))), *zip(*blocks, strict=True), budget)
    for columns in (contest.columns(torch.tensor(scores)), contest.columns(torch.tensor(scores))):
        for (end, edge), found in zip(blocks, columns, strict=True):
            for row, each in zip(scores, found, strict=True):
                others = sorted(range(end - edge), key=lambda column, row=row: (-row[column], column))
                assert each.tolist() == sorted([*others[: budget - edge], *range(end - edge, end)])


def test_what_is_kept_for_later_rounds() -> None:
    """The columns before all that compete and those that are chosen; everything, untouched, while all fits."""
    pairs = torch.arange(2.0 * 2 * 4 * 3).view(2, 2, 4, 3)
    assert kept(pairs, 1, None) is pairs
    found = kept(pairs, 1, torch.tensor([[2, 3], [1, 3]]))
    assert torch.equal(found[:, 0], pairs[:, 0, [0, 2, 3]])
    assert torch.equal(found[:, 1], pairs[:, 1, [0, 1, 3]])
