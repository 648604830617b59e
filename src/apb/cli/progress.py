"""Progress on standard error, on a terminal with a picture of who reads what."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..planning.plan import Plan
from .plan_plot import named

# Seconds between lines without a terminal.
_SECONDS = 30.0
# Lines of a terminal that the rows of ranks leave to what stands around them.
_AROUND = 6
_READ, _PASSED, _NOT_YET = "blue", "dark_orange3", "dim"


class Bar:
    """A progress bar with the time left; ``update`` can be passed to :meth:`apb.Engine.prefill` as ``progress``.

    If standard error is no terminal, it prints a line every 30 seconds and one at the end instead.

    Attributes:
        on_terminal: True if there is a bar, and :meth:`begin` draws.
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
        self.on_terminal = shown and console.is_terminal
        self._bar = _Pictured(*columns, console=console, disable=not self.on_terminal)
        self._in_lines = shown and not console.is_terminal
        self._told = time.monotonic()
        self._title, self._unit = title, unit
        self._open = False
        self._closed = False

    def __enter__(self) -> Bar:
        return self

    def begin(self, plan: Plan) -> None:
        """Draw above the bar who reads what by a plan; ``update`` then counts the tokens of its prompt."""
        self._bar.picture = Picture(plan)

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


class Picture:
    """A plan as lines of text: a row for each rank, a bar for each of its blocks, and what the blocks pass on.

    A bar stands at its block's place in the prompt and fills as the layers are read; blocks of one round fill together,
    since in every layer all of them are attended before the next. In the last row a bar is as long as the share of its
    block's pairs that is passed on. All of this is the plan's: which pairs they are stays on the device.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._blocks = list(plan.all_blocks())
        self._sizes = [0] * plan.rounds
        for block in self._blocks:
            self._sizes[block.round] += len(block)
        self._sizes[-1] += plan.query

    def lines(self, done: int, width: int, height: int, ascii_only: bool = False) -> list[Text]:
        """The picture once ``done`` tokens are read, in at most so many columns and lines."""
        plan = self.plan
        shown = plan.ranks if plan.ranks <= height else max(height - 1, 1)
        labels = [f"rank {rank}" for rank in range(shown)] + ["passed"]
        indent = max(map(len, labels)) + 2
        rows = [Text(label.ljust(indent), no_wrap=True, overflow="crop") for label in labels]
        scale = max(width - indent, 1) / plan.query_start
        shares = self._shares(done)
        for block in self._blocks:
            start, stop = indent + round(block.start * scale), indent + round(block.stop * scale)
            cells = stop - start - (stop - start > 2)  # a gap to the next one, where there is room
            passed = -(-cells * plan.passed(block.index) // len(block))
            drawn = [(block.rank, cells, _READ), (shown, passed, _PASSED)]
            for row, length, style in drawn if block.rank < shown else drawn[1:]:
                rows[row].append(" " * (start - len(rows[row])))
                done_cells = int(length * shares[block.round])
                rows[row].append("=" * done_cells if ascii_only else "━" * done_cells, style)
                rows[row].append(("-" if ascii_only else "─") * (length - done_cells), _NOT_YET)
        passes = any(plan.passed(block.index) for block in self._blocks)
        more = [Text(f"and {plan.ranks - shown:,} more ranks", _NOT_YET)] if shown < plan.ranks else []
        return [Text(named(plan), no_wrap=True, overflow="ellipsis"), *rows[:shown], *more, *rows[shown:][:passes]]

    def _shares(self, done: int) -> list[float]:
        """The share of every round that is read; progress counts the question with the last."""
        found, before = [], 0
        for size in self._sizes:
            found.append(min(max((done - before) / size, 0.0), 1.0))
            before += size
        return found


class _Pictured(Progress):
    """A progress bar below a picture, if there is one."""

    picture: Picture | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        """See :meth:`rich.progress.Progress.get_renderables`."""
        if self.picture is not None and self.tasks:
            size = self.console.size
            done = int(self.tasks[0].completed)
            yield from self.picture.lines(done, size.width, size.height - _AROUND, self.console.options.ascii_only)
        yield self.make_tasks_table(self.tasks)
