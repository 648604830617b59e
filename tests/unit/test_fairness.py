"""Whose turn it is: short work first, what has waited in the end, and answers go on between the pieces of a prefill."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import psutil
import pytest
import torch
from torch import Tensor

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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_what_a_request_freed_is_the_systems_again() -> None:
    """Even where something that stays, such as a document, lies behind it in the heap of the request's thread."""
    kept: list[Tensor] = []

    def work(pause: Callable[[], None]) -> None:
        pieces: list[Tensor] = []
        for _ in range(3):  # the first ones are not on the heap: glibc learns how large its pieces are
            pieces.clear()
            pieces.extend(torch.ones(1 << 18) for _ in range(100))
        kept.append(pieces[-1])

    turn, before = Turn(work, torch.device("cpu")), psutil.Process().memory_info().rss
    ended = turn.go_on()
    assert ended is not None and ended.error is None and len(kept) == 1
    assert psutil.Process().memory_info().rss - before < 50 << 20
