"""Signs of life of the ranks: a rank that is gone, or gives none, ends this one, so that all can be started again."""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

# Seconds without a sign of life after which a rank counts as lost, and between signs.
PATIENCE_S = 30.0
_BETWEEN_S = 1.0


class SignsOfLife:
    """A thread on every rank, in a collective of its own: ranks wait for each other in work for as long as it takes."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._over = threading.Event()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience_s))
        self._thread = threading.Thread(target=self._run, daemon=True)

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
                # This rank may be in a collective that never ends, which nothing but its end gets it out of.
                print("apb: a rank has given no sign of life; this one ends too", file=sys.stderr, flush=True)
                os._exit(1)
