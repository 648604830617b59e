"""The beginning of ``apb``: Ctrl-C is answered in a word also while the commands are still being imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """What is installed as ``apb``: see :func:`apb.cli.main.main`."""
    answer_interrupts()
    from .main import main

    main()


def answer_interrupts() -> None:
    """Handle Ctrl-C by :func:`interrupted`, unless it is handled otherwise, or ignored, as under nohup."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


def interrupted(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C: raise KeyboardInterrupt, but exit at once during an import.

    Libraries mistake an interrupted import for a missing module and go on; nothing has been started by then.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(say("interrupted", INTERRUPTED))
        frame = frame.f_back
    raise KeyboardInterrupt


def say(sentence: str, status: int) -> int:
    """Print a sentence for the user; returns the exit status."""
    print(f"apb: {sentence}", file=sys.stderr, flush=True)
    return status
