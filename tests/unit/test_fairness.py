"""Whose turn it is: short work first, what has waited in the end, and answers go on between the pieces of a prefill."""

from __future__ import annotations

import time

import psutil
import pytest
import torch
from torch import Tensor

from apb.serving import turns
from apb.serving.fairness import Pace, Share, next_of
from apb.serving.turns import Turn

PACE = Pace(read_s=0.001, write_s=0.01)


def test_a_short_question_overtakes() -> None:
    """Even one that came later, whatever the long one has done so far but for its end."""
    long = Share(32_000, 64, since=time.monotonic() - 5, read=16_000, reading_s=5.0, worked_s=5.0)
    short = Share(1_000, 8)
    assert next_of([long, short], PACE) is short
    long.read = 31_900
    assert next_of([long, short], PACE) is long


def test_nothing_waits_for_ever() -> None:
    """Short ones keep coming, each new; the long one's turn comes once it has waited in proportion to its work."""
    long = Share(20_000, 1, since=time.monotonic() - 60)
    short = Share(1_000, 1)
    assert next_of([long, short], PACE) is short
    long.since -= 60
    assert next_of([long, Share(1_000, 1)], PACE) is long


def test_answers_go_on_between_the_pieces_of_another() -> None:
    """Whoever reads, one that writes gets a token after it, the one that came first before others."""
    reading, writing = Share(1_000, 1), Share(100, 5_000, read=100, written=900, owed=True)
    assert next_of([reading, writing], PACE) is writing
    writing.owed = False
    assert next_of([reading, writing], PACE) is reading
    first = Share(100, 10, read=100, owed=True, since=time.monotonic() - 9)
    writing.owed = True
    assert next_of([reading, writing, first], PACE) is first


def test_the_pace_is_measured() -> None:
    """Later measurements count more, and change what is predicted."""
    pace = Pace()
    for _ in range(40):
        pace.saw_read(1_000, 2.0)
    assert pace.read_s == pytest.approx(0.002, rel=1e-3)
    share, now = Share(1_000, 0), time.monotonic()
    assert share.rank(pace, now) == pytest.approx(2.0, rel=0.01)


# The test is of glibc's heaps, and of a call that gives their memory back. Where the library of C has no such call, on
# macOS or with musl, nothing is promised: what is freed there is the system's when that library says so.
@pytest.mark.skipif(turns._trim is None, reason="this library of C has no malloc_trim")
def test_what_a_request_freed_is_the_systems_again() -> None:
    """Even where something that stays, such as a document, lies behind it in the heap of the request's thread."""
    kept: list[Tensor] = []

    def work(turn: Turn) -> None:
        pieces: list[Tensor] = []
        for _ in range(3):  # the first ones are not on the heap: glibc learns how large its pieces are
            pieces.clear()
            pieces.extend(torch.ones(1 << 18) for _ in range(100))
        kept.append(pieces[-1])

    turn, before = Turn(work, torch.device("cpu")), psutil.Process().memory_info().rss
    ended = turn.go_on()
    assert ended is not None and ended.error is None and len(kept) == 1
    assert psutil.Process().memory_info().rss - before < 50 << 20


def test_short_texts_are_read_before_others_are_answered() -> None:
    """So that answers are written together; one that takes longer to read than another takes to write waits for it."""
    writing = Share(1_000, 200, read=1_000, written=5)
    assert next_of([writing, Share(100, 500)], PACE).to_read == 100
    assert next_of([writing, Share(1_000, 1)], PACE) is writing


def written(pace: Pace, seconds: float, tokens: int, times: int = 4) -> None:
    """So many passes that each wrote a token of so many answers."""
    for _ in range(times):
        pace.saw_written(seconds, tokens)


def test_tokens_are_read_the_quicker_way() -> None:
    """Each way is tried, its first passes do not count against it, and what is judged is the time of one token."""
    pace = Pace()
    assert pace.in_one_pass(16)
    written(pace, 2.0, 16, 1)  # kernels are compiled
    written(pace, 0.16, 16, 3)
    assert not pace.in_one_pass(16)
    written(pace, 0.02, 1)
    assert pace.in_one_pass(16)
    assert pace.in_one_pass(2)  # not tried yet
    written(pace, 0.05, 2)
    assert not pace.in_one_pass(2) and pace.in_one_pass(16)


def test_the_slower_way_is_tried_again() -> None:
    """Once in a thousand tokens; it is taken up when it has become the quicker one."""
    pace = Pace()
    written(pace, 0.1, 4)
    written(pace, 0.01, 1)
    tried = []
    for token in range(2100):
        tried += [token] * pace.in_one_pass(4)
        pace.saw_written(0.01)
    assert len(tried) == 2
    written(pace, 0.02, 4)
    assert pace.in_one_pass(4)
    for _ in range(300):
        assert pace.in_one_pass(4) or pace.since == 0
        pace.saw_written(0.02, 4)
