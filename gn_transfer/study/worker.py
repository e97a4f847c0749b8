"""A worker: claims cells and runs them one after another in its own process, until it is told to stop."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gn_transfer import cli
from gn_transfer.arguments import Arguments
from gn_transfer.callbacks import AtomicCheckpointIO, read_checkpoint
from gn_transfer.config import ConfigError
from gn_transfer.loggers import RunFolder, RunLog
from gn_transfer.study.cells import Cell
from gn_transfer.study.definition import Study
from gn_transfer.study.planning import Outcome
from gn_transfer.study.serve import serve
from gn_transfer.study.store import Store


@dataclass(frozen=True)
class Bench:
    """What the cells of a worker share.

    Attributes:
        study: The study.
        root: Folder of ``runs/`` and ``checkpoints/``.
    """

    study: Study
    root: Path


class CellCommand(cli.Command):
    """``fit`` in a folder named after the cell, which a resumed run finds again."""

    draws = False  # a second for each validation, in runs that are looked at together

    def __init__(self, arguments: Arguments, bench: Bench, cell: Cell) -> None:
        self.bench, self.cell = bench, cell
        arguments.config_name = bench.study.name
        super().__init__(arguments, log=_quiet_log())

    def claim_folder(self, resumed: dict[str, Any] | None) -> RunFolder:
        """Take the cell's own folder."""
        run = _folder(self.bench, self.cell)
        run.logs.mkdir(parents=True, exist_ok=True)
        return run

    def facts(self) -> dict[str, Any]:
        """Say which cell the run is."""
        return {"study": self.bench.study.name, "stage": self.cell.stage, "arm": self.cell.arm, "case": self.cell.case}


def work(url: str, bench: Bench, stop: Event, log: Path) -> None:
    """Run cells until told to stop; what a process of its own is started with.

    Args:
        url: Database of the study.
        bench: What all cells share.
        stop: Event that ends the work after the cell at hand.
        log: File that takes what cells print.
    """
    os.setsid()  # Ctrl-C goes to the command, which tells us
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_die_with_parent, name="parent", daemon=True).start()
    store = Store(url, bench.study.name)
    store.begin(bench.study.shared_settings())
    try:
        serve(store, bench.study, lambda cell: run_cell(bench, cell), stop)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        store.close()


def run_cell(bench: Bench, cell: Cell) -> Outcome:
    """Train or test a cell, going on where an earlier attempt left off.

    Args:
        bench: What all cells share.
        cell: The cell.

    Returns:
        What became of it; a failure is told, not raised.
    """
    began = time.monotonic()
    split = "test" if cell.stage == "test" else "val"
    try:
        record = _test(bench, cell) if cell.stage == "test" else _train(bench, cell)
        accuracy, loss = float(record[f"{split}/acc1"]), float(record[f"{split}/loss"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except ConfigError as error:
        return Outcome("failed", seconds=time.monotonic() - began, reason=str(error))
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", seconds=time.monotonic() - began, reason=f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - began
    _tidy()
    return Outcome("complete", accuracy, loss, seconds)


def _train(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Fit a cell; one whose checkpoint cannot be read starts again."""
    run = _folder(bench, cell)
    record = _record(run)
    if record.get("status") == "finished":
        _thin_out(bench.study, cell, run)
        return record
    arguments = ["--config", str(bench.study.base), *_defaults(), *cell.arguments()]
    last = run.checkpoints / "last.ckpt"
    _reset_peak_memory()
    if _is_readable(last):
        arguments += ["--ckpt_path", str(last)]
    else:
        for folder in (run.logs, run.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
    cli.run("fit", arguments, lambda given: CellCommand(given, bench, cell))
    record = _record(run)
    if record.get("status") != "finished":
        raise ConfigError(f"the run did not come to its end; {run.logs / 'run.log'} says more.")
    _thin_out(bench.study, cell, run)
    return record


def _is_readable(checkpoint: Path) -> bool:
    try:
        read_checkpoint(checkpoint)
    except ConfigError:
        return False
    return True


def _test(bench: Bench, cell: Cell) -> dict[str, Any]:
    run = _folder(bench, cell)
    record = _record(run)
    if "test/acc1" not in record:
        checkpoint = run.checkpoints / f"{bench.study.test}.ckpt"
        arguments = ["--ckpt_path", str(checkpoint)]
        root = cell.overrides.get("data.root")
        arguments += [] if root is None else ["--data.root", str(root)]
        cli.run("test", arguments, lambda given: cli.Command(given, log=_quiet_log()))
        record = _record(run)
    if bench.study.keep == "none" and "test/acc1" in record:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return record


def _thin_out(study: Study, cell: Cell, run: RunFolder) -> None:
    """Keep of a finished run's checkpoints what is needed: the weights that will be tested, or nothing."""
    if cell.stage == "select" or (study.keep == "none" and study.test == "never"):
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        return
    for path in run.checkpoints.glob("*.ckpt"):
        if path.stem != ("best" if study.test == "best" else "last"):
            path.unlink()
        elif (content := read_checkpoint(path))["optimizer_states"]:
            AtomicCheckpointIO().save_checkpoint({**content, "optimizer_states": [], "lr_schedulers": []}, path)


def _folder(bench: Bench, cell: Cell) -> RunFolder:
    return RunFolder(f"{bench.study.name}/{cell.run}", bench.root)


def _record(run: RunFolder) -> dict[str, Any]:
    try:
        content = json.loads((run.logs / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _defaults() -> Sequence[str]:
    """Leave the cores to the compute threads, of which each worker has its share."""
    quiet = ["--trainer.enable_progress_bar", "false"]
    return quiet if torch.cuda.is_available() else [*quiet, "--data.num_workers", "0"]


def _quiet_log() -> RunLog:
    return RunLog(Console(file=io.StringIO(), width=120))


def _reset_peak_memory() -> None:
    """Let the peak memory be that of the next run, not of all before it in this process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _tidy() -> None:
    """Give memory back, so that a worker stays as small after a hundred cells as after one."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(130)


def interrupt(pid: int) -> None:
    """Ask a worker to save what it is at and to end."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)
