"""Signs of life of the ranks: one that is gone, or gives none, ends all of them, so that they can be started again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

# Seconds without a sign of life after which a rank counts as lost, and between signs.
PATIENCE_S = 30.0
_BETWEEN_S = 1.0
# Seconds that whoever started the ranks has to end this one; it names the rank whose end it sees first.
_GRACE_S = 5.0


class SignsOfLife:
    """A thread on every rank, in a collective of its own: ranks wait for each other in work for as long as it takes."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._over = threading.Event()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience_s))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._pids = torch.zeros(dist.get_world_size(), dtype=torch.long)
        self._pids[dist.get_rank()] = os.getpid()
        dist.all_reduce(self._pids, group=self._group)

    def start(self) -> None:
        """Begin; every rank calls it."""
        self._thread.start()

    def stop(self) -> None:
        """From now on other ranks may end."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(_BETWEEN_S):
            try:
                dist.all_reduce(torch.zeros(1), group=self._group)
            except RuntimeError:
                if self._over.wait(_BETWEEN_S):
                    return
                print("apb: a rank has given no sign of life; all are ended", file=sys.stderr, flush=True)
                self._end_others()
                # This rank may be in a collective that never ends, which nothing but its end gets it out of.
                time.sleep(_GRACE_S)
                os._exit(1)

    def _end_others(self) -> None:
        """End the other ranks on this machine: a stopped one heeds no signal but this, and torch waits 30 s for it."""
        # What a number from another machine means here is none of ours.
        siblings = {child.pid for child in psutil.Process(os.getppid()).children()}
        for pid in siblings.intersection(self._pids.tolist()) - {os.getpid()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
