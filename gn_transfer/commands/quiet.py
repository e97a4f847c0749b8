"""What is not printed while a training runs, since users can do nothing about it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_writer() -> Iterator[None]:
    """Print no traceback of TensorBoard's thread that could not write: the next call of the logger says it."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        of_writer = type(failed.thread).__name__ == "_AsyncWriterThread"
        if not (of_writer and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Silence what users can do nothing about."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # the number of workers is chosen, and printed
            ".*You're resuming from a checkpoint that ended before the epoch ended.*",  # our sampler resumes inside it
            ".*number of training batches.*smaller than the logging interval.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*Experiment logs directory .* exists and is not empty.*",
            ".*isinstance.treespec, LeafSpec.*",
            ".*recommended to use `self.log.*sync_dist=True.*",  # torchmetrics has gathered the values already
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
