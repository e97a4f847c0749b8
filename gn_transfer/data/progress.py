"""A progress bar for what goes through many images; nothing where standard error is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int, fewest: int = 1) -> Iterator[Callable[[], None]]:
    """Show how far a job is.

    Args:
        what: What is being done.
        total: Steps in all.
        fewest: With fewer steps than these no bar is shown.

    Yields:
        Call it after every step, from any thread.
    """
    if total < fewest or not sys.stderr.isatty():
        yield lambda: None
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
