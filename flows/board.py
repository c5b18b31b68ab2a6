"""The board: progress on the terminal. Bars where somebody watches, plain lines where output goes to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Board:
    """Counts the steps of a run, and shows those under way. Use as a context manager."""

    def __init__(self, console: Console, quiet: bool, total: int) -> None:
        self.done = 0
        self.reused_steps = 0
        self._console = console
        self._bars = console.is_terminal and not quiet
        self._lines = not console.is_terminal and not quiet
        self._rows: dict[str, TaskID] = {}
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not self._bars)
        self._all = self._progress.add_task("[bold]all steps", total=total, note="")

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, label: str) -> None:
        if label not in self._rows:
            self._rows[label] = self._progress.add_task(label, total=None, note="")

    def advanced(self, label: str, done: int, total: int, note: str) -> None:
        if label in self._rows:
            self._progress.update(self._rows[label], completed=done, total=total, note=note)

    def finished(self, label: str) -> None:
        self.done += 1
        self._close(label)
        if self._lines:
            self._console.print(f"done: {label}", highlight=False)

    def reused(self, label: str) -> None:
        self.reused_steps += 1
        self._close(label)

    def waiting(self, label: str, why: str) -> None:
        if self._bars or self._lines:
            self._console.print(f"[yellow]trying again:[/] {label}: {why}", highlight=False)

    def _close(self, label: str) -> None:
        self._progress.advance(self._all)
        if label in self._rows:
            self._progress.remove_task(self._rows.pop(label))


@contextmanager
def bar(console: Console, label: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for work outside flows, on terminals only."""
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as shown:
        row = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(row, completed=done, total=total)
