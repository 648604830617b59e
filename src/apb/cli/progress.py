"""Progress on standard error."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A bar with the time left. ``update`` is what :meth:`apb.Engine.prefill` takes as ``progress``."""

    def __init__(self, title: str, unit: str, shown: bool = True) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(unit + " {task.completed} of {task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._title = title
        self._open = False
        self._closed = False

    def __enter__(self) -> Bar:
        return self

    def update(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are."""
        if not self._open:
            self._open = True
            self._bar.start()
            self._bar.add_task(self._title, total=total)
        self._bar.update(self._bar.task_ids[0], completed=done)

    def close(self) -> None:
        """Stop drawing; what is drawn stays."""
        if self._open and not self._closed:
            self._closed = True
            self._bar.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
