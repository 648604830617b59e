"""Which request works next: the one that is done soonest, unless another has waited too long."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

# Seconds of a request's own work that one second of waiting is worth: so much sooner it counts as done.
AGING = 0.25
# Before anything has been measured: seconds per token read, and per token written.
_READ_S, _WRITE_S = 3e-4, 2e-2
# Tokens that an answer is expected to have at least.
_EXPECTED = 32


@dataclass
class Pace:
    """Seconds per token, as measured so far on this server: the first measurement alone, then later ones count more."""

    read_s: float = _READ_S
    write_s: float = _WRITE_S
    reads: int = 0
    writes: int = 0

    def saw_read(self, tokens: int, seconds: float) -> None:
        """So many of a prompt's tokens have been read; one of its layers counts as that share of them."""
        self.reads += 1
        self.read_s += max(0.1, 1 / self.reads) * (seconds / tokens - self.read_s)

    def saw_written(self, seconds: float) -> None:
        """A token has been written."""
        self.writes += 1
        self.write_s += max(0.1, 1 / self.writes) * (seconds - self.write_s)


@dataclass
class Share:
    """What the order of requests depends on, for one of them.

    Attributes:
        to_read: tokens of the prompt that have to be read.
        to_write: the most tokens that its answer may have.
        read, written: how many of them are done.
        since: when it came.
        worked_s, reading_s: seconds it has worked since, and those of them in which it read.
        owed: True if it is writing, and another one has read since its last token.
    """

    to_read: int
    to_write: int
    read: int = 0
    written: int = 0
    since: float = field(default_factory=time.monotonic)
    worked_s: float = 0.0
    reading_s: float = 0.0
    owed: bool = False

    @property
    def writing(self) -> bool:
        """True once all of the prompt has been read."""
        return self.read >= self.to_read

    def rank(self, pace: Pace, now: float) -> float:
        """The predicted seconds to its end, less what its waiting is worth; the lowest goes first."""
        per_token = self.reading_s / self.read if self.read and self.reading_s else pace.read_s
        # How long an answer gets is not known before: as long again as it is, if it may.
        to_write = min(self.to_write - self.written, max(self.written, _EXPECTED))
        left = (self.to_read - self.read) * per_token + to_write * pace.write_s
        return left - AGING * (now - self.since - self.worked_s)


def next_of(shares: Iterable[Share], pace: Pace) -> Share:
    """The next to work.

    An answer that is being written gets a token after every piece that another request reads. Apart from that the
    shortest remaining work goes first, so that a short question overtakes a long text, which loses no more by it than
    the short one costs; what has waited long comes first in the end, however many short ones follow.
    """
    waiting = list(shares)
    owed = [share for share in waiting if share.writing and share.owed]
    if owed:
        return min(owed, key=lambda share: share.since)
    now = time.monotonic()
    return min(waiting, key=lambda share: share.rank(pace, now))
