"""Which request works next: the one that is read or written soonest, unless another has waited too long."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

# Seconds of a request's own work that one second of waiting is worth: so much sooner it counts as done.
AGING = 0.25
# Before anything has been measured: seconds per token read, and per token written.
_READ_S, _WRITE_S = 3e-4, 2e-2
# Tokens that an answer is expected to have at least.
_EXPECTED = 32
# Passes by which a way of reading tokens is judged: the first ones compile kernels.
_JUDGED = 4
# Tokens after which the way that took longer is tried again: texts grow, and so does what others do to the machine.
_TRIED_AGAIN = 1000


@dataclass
class Pace:
    """Seconds per token, as measured so far on this server: the first measurement alone, then later ones count more.

    Attributes:
        read_s, write_s: per token of a prompt, and of an answer.
        reads, writes: how many measurements there were.
        ways: by the number of requests that one pass read a token of, the last passes' seconds per token.
        since: tokens written since the slower way was tried.
    """

    read_s: float = _READ_S
    write_s: float = _WRITE_S
    reads: int = 0
    writes: int = 0
    ways: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_JUDGED)))
    since: int = 0

    def saw_read(self, tokens: int, seconds: float) -> None:
        """So many of a prompt's tokens have been read; one of its layers counts as that share of them."""
        self.reads += 1
        self.read_s += max(0.1, 1 / self.reads) * (seconds / tokens - self.read_s)

    def saw_written(self, seconds: float, tokens: int = 1) -> None:
        """A pass has read a token of each of so many answers, and the next ones have been written."""
        self.writes += 1
        self.since += tokens
        self.ways[tokens].append(seconds / tokens)
        self.write_s += max(0.1, 1 / self.writes) * (seconds / tokens - self.write_s)

    def in_one_pass(self, answers: int) -> bool:
        """Whether the next tokens of so many answers are to be read in one pass, or one after the other.

        One pass reads the weights once for all, but where it is no captured step and single tokens are, it is launched
        kernel by kernel. What was quicker per token is done; the other way is tried first, and now and then.
        """
        alone, together = self.ways[1], self.ways[answers]
        if len(together) < _JUDGED:
            return True
        if len(alone) < _JUDGED:
            return False
        again = self.since >= _TRIED_AGAIN
        if again:
            self.since = 0
        return (min(together) < min(alone)) != again


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

    def reading_left_s(self, pace: Pace) -> float:
        """The predicted seconds until all has been read."""
        per_token = self.reading_s / self.read if self.read and self.reading_s else pace.read_s
        return (self.to_read - self.read) * per_token

    def writing_left_s(self, pace: Pace) -> float:
        """The predicted seconds that its answer takes from now on."""
        # How long an answer gets is not known before: as long again as it is, if it may.
        return min(self.to_write - self.written, max(self.written, _EXPECTED)) * pace.write_s

    def waited_s(self, now: float) -> float:
        """Seconds that it has not worked."""
        return now - self.since - self.worked_s

    def rank(self, pace: Pace, now: float) -> float:
        """The predicted seconds until it has been read, or written, less what its waiting is worth; the lowest first.

        One that is still read does not count its answer: that is written with those of others, and costs them little.
        """
        left = self.writing_left_s(pace) if self.writing else self.reading_left_s(pace)
        return left - AGING * self.waited_s(now)


def next_of(shares: Iterable[Share], pace: Pace) -> Share:
    """The next to work.

    An answer that is being written gets a token after every piece that another request reads. Apart from that what is
    read or written soonest goes first, so that a short question overtakes a long text, which loses no more by it than
    the short one costs; what has waited long comes first in the end, however many short ones follow.
    """
    waiting = list(shares)
    owed = [share for share in waiting if share.writing and share.owed]
    if owed:
        return min(owed, key=lambda share: share.since)
    now = time.monotonic()
    return min(waiting, key=lambda share: share.rank(pace, now))
