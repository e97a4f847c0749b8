"""Bars for what goes through many images, a clock for what does not; lines where standard error is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENCE_SECONDS = 30.0
"""Without a terminal, a line says at least so often how far a job is."""


@contextmanager
def progress_bar(what: str, total: int, fewest: int = 1) -> Iterator[Callable[[], None]]:
    """Show how far a job is; without a terminal, a line every 30 seconds says it.

    Args:
        what: What is being done.
        total: Steps in all.
        fewest: With fewer steps than these no bar is shown.

    Yields:
        Call it after every step, from any thread.
    """
    if total < fewest:
        yield lambda: None
        return
    if not sys.stderr.isatty():
        yield _Lines(what, total).advance
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:  # installed for prediction alone
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


class _Lines:
    """Counts steps, and prints a line now and then."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.spoken = what, total, 0, time.monotonic()

    def advance(self) -> None:
        """Count a step."""
        self.done += 1
        if time.monotonic() - self.spoken > SILENCE_SECONDS:
            self.spoken = time.monotonic()
            print(f"{self.what} {self.done:,}/{self.total:,}", file=sys.stderr, flush=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that a job of unknown length is alive, with the time that it has taken.

    Args:
        what: What is being done.
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=None)
        yield
