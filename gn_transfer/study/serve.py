"""The loop of a worker: claim a cell, run it, note what became of it, until told to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gn_transfer.study.cells import Cell
from gn_transfer.study.definition import Study
from gn_transfer.study.planning import Outcome, plan_cells
from gn_transfer.study.store import Store

IDLE_SECONDS = 0.5


class Stop(Protocol):
    """What an event of threading and of multiprocessing have in common."""

    def is_set(self) -> bool:
        """Tell whether it is time to stop."""

    def wait(self, timeout: float) -> bool:
        """Wait, but no longer than until it is time to stop."""


def serve(store: Store, study: Study, run: Callable[[Cell], Outcome], stop: Stop) -> None:
    """Run the cells of a study that nobody else runs.

    Args:
        store: Its database, begun.
        study: The study, with this machine's paths.
        run: Runs a cell; tells a failure, and raises only what ends the worker.
        stop: Looked at before each cell.
    """
    while not stop.is_set():
        cells = plan_cells(study, store.outcomes()).cells
        claim = store.claim({cell.name: cell for cell in cells})
        if claim is None:
            stop.wait(IDLE_SECONDS)
            continue
        with store.alive(claim):
            outcome = run(claim.cell)
        store.finish(claim, outcome)
