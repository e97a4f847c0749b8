"""What the program says during a run, on the terminal and in the run's ``run.log``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TextIO

from rich import get_console
from rich.console import Console

from gn_transfer.config import printable
from gn_transfer.files import going_on_without


class RunLog:
    """What the program says, on the terminal and in the run's ``run.log``.

    Args:
        console: The terminal; ``None`` takes rich's own, so that lines go above a progress bar, not through it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or get_console()
        self._buffer: TextIO = io.StringIO()
        self._copy = _console_for(self._buffer)

    def print(self, *renderables: Any) -> None:
        """Print rich renderables or text; markup in square brackets is not interpreted."""
        text = all(isinstance(renderable, str) for renderable in renderables)  # a command must not be broken over lines
        renderables = tuple(printable(one) if isinstance(one, str) else one for one in renderables)
        with going_on_without("the terminal"):  # a training goes on when its terminal is closed
            self.console.print(*renderables, markup=False, highlight=False, soft_wrap=text)
        with going_on_without("run.log"):
            self._copy.print(*renderables, markup=False, highlight=False, soft_wrap=text)
            self._buffer.flush()

    def attach(self, path: Path) -> None:
        """Go on in a file, beginning with what has been said so far; an existing file is continued.

        A log that has a file keeps it: a training may begin again in the folder of its run.
        """
        if not isinstance(self._buffer, io.StringIO):
            return
        said = self._buffer.getvalue()
        self._buffer = path.open("a", encoding="utf-8")
        self._buffer.write(said)
        self._buffer.flush()
        self._copy = _console_for(self._buffer)

    def close(self) -> None:
        """Close the file."""
        with going_on_without("run.log"):
            self._buffer.close()


def _console_for(file: TextIO) -> Console:
    # In a notebook, rich would show the text below the cell instead of writing it.
    return Console(file=file, width=120, color_system=None, force_jupyter=False)
