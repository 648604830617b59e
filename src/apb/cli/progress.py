"""Progress on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Seconds between lines without a terminal.
_SECONDS = 30.0


class Bar:
    """A progress bar with the time left; ``update`` can be passed to :meth:`apb.Engine.prefill` as ``progress``.

    If standard error is no terminal, it prints a line every 30 seconds and one at the end instead.
    """

    def __init__(self, title: str, unit: str, shown: bool = True) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(unit + " {task.completed} of {task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self._in_lines = shown and not console.is_terminal
        self._told = time.monotonic()
        self._title, self._unit = title, unit
        self._open = False
        self._closed = False

    def __enter__(self) -> Bar:
        return self

    def update(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units are done."""
        if not self._open:
            self._open = True
            self._bar.start()
            self._bar.add_task(self._title, total=total)
        self._bar.update(self._bar.task_ids[0], completed=done)
        if self._in_lines and (done == total or time.monotonic() - self._told > _SECONDS):
            self._told = time.monotonic()
            print(f"{self._title}: {self._unit} {done} of {total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the bar and leave it on the screen."""
        if self._open and not self._closed:
            self._closed = True
            self._bar.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
