"""Functions in a process of their own, which starts at once with everything that is imported here."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def run_forked(function: Callable[[], int], seconds: float, output: Path | None = None) -> int | None:
    """Run a function in a forked process.

    Args:
        function: Gives an exit code; an exception counts as 1, and its traceback goes to the output.
        seconds: Time that it may take.
        output: File for what it prints; None throws that away.

    Returns:
        Its exit code, negative for a signal that ended it; None where it took too long and was killed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            with open(output or os.devnull, "wb") as file:  # noqa: PTH123 - a descriptor is needed
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115 - lives as long as the process
            code = function()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # whatever it was, this process ends here
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 255)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
