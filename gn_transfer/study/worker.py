"""A worker: claims trials and runs them one after another in its own process, until it is told to stop."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from gn_transfer.config import ConfigError
from gn_transfer.data.workers import choose_num_workers
from gn_transfer.files import going_on_without, read_json, refuse_link, remove_leftovers
from gn_transfer.study.database import patiently
from gn_transfer.study.definition import Study
from gn_transfer.study.planning import Outcome, plan_trials
from gn_transfer.study.store import Store
from gn_transfer.study.trials import Trial, arguments_of
from gn_transfer.training.checkpoint import CorruptCheckpointError, read_checkpoint
from gn_transfer.training.checkpoint_callbacks import write_checkpoint
from gn_transfer.training.progress import reset_peak_memory
from gn_transfer.training.run_folder import LAST, PREVIOUS, RunFolder, refuse_links

IDLE_SECONDS = 0.5
"""Time between two looks for a trial to claim."""


@dataclass(frozen=True)
class StudyContext:
    """What the trials of a worker share.

    Attributes:
        study: The study.
        root: Folder of ``runs/`` and ``checkpoints/``.
        train: Trains one configuration: arguments of ``fit``, the run's folder, further entries of metrics.json.
        test: Tests one checkpoint: arguments of ``test``.
    """

    study: Study
    root: Path
    train: Callable[[Sequence[str], RunFolder, Mapping[str, Any]], object]
    test: Callable[[Sequence[str]], object]


class Stop(Protocol):
    """What tells a worker to stop: an event of threading, or :class:`StopWithParent`."""

    def is_set(self) -> bool:
        """Tell whether it is time to stop."""

    def wait(self, timeout: float) -> bool:
        """Wait, but no longer than until it is time to stop."""


class StopWithParent:
    """Says stop when the command closes its end of a pipe, or ends.

    An event of multiprocessing would keep the command waiting for ever for a worker that was killed while it waited.

    Args:
        connection: The worker's end.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def is_set(self) -> bool:
        """Tell whether it is time to stop."""
        return self.wait(0.0)

    def wait(self, timeout: float) -> bool:
        """Wait for so many seconds, but no longer than until it is time to stop."""
        return self._connection.poll(timeout)  # the end of the file counts as something to read


def run_trials(store: Store, study: Study, run: Callable[[Trial], Outcome], stop: Stop) -> None:
    """Claim trials and run them, until told to stop.

    Args:
        store: Its database, begun.
        study: The study, with this machine's paths.
        run: Runs a trial; tells a failure, and raises only what ends the worker.
        stop: Looked at before each trial.
    """
    while not stop.is_set():
        outcomes = patiently(store.outcomes)
        trials = {trial.name: trial for trial in plan_trials(study, outcomes).trials}
        # Claiming locks the study and reads it again, which grows with its trials.
        is_open = any(not outcome.ended for name, outcome in outcomes.items() if name in trials)
        claim = patiently(partial(store.claim, trials)) if is_open else None
        if claim is None:
            stop.wait(IDLE_SECONDS)
            continue
        with store.alive(claim):
            outcome = run(claim.trial)
        patiently(partial(store.finish, claim, outcome))


def work(url: str, context: StudyContext, connection: Connection, log: Path) -> None:
    """Run trials until told to stop; what a process of its own is started with.

    Args:
        url: Database of the study.
        context: What all trials share.
        connection: Closed by the command when the work is to end after the trial at hand.
        log: File that takes what trials print.
    """
    os.setsid()  # Ctrl-C goes to the command, which tells us
    refuse_link(log)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_die_with_parent, name="parent", daemon=True).start()
    store = Store(url, context.study.name)
    store.begin(context.study.shared_settings())
    try:
        run_trials(store, context.study, partial(run_trial, context), StopWithParent(connection))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        store.close()


def run_trial(context: StudyContext, trial: Trial) -> Outcome:
    """Train or test a trial, going on where an earlier attempt left off.

    Args:
        context: What all trials share.
        trial: The trial.

    Returns:
        What became of it; a failure is told, not raised.
    """
    began = time.monotonic()
    split = "test" if trial.stage == "test" else "val"
    try:
        record = _test(context, trial) if trial.stage == "test" else _train(context, trial)
        metric = f"{split}/{context.study.metric}"
        if metric not in record:
            raise ConfigError(
                f"its run has no {metric}, by which the study compares: give all trials data of one task."
            )
        value, loss = float(record[metric]), float(record[f"{split}/loss"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except ConfigError as error:
        return Outcome("failed", seconds=time.monotonic() - began, reason=str(error))
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", seconds=time.monotonic() - began, reason=f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - began
    _tidy()
    return Outcome("complete", value, loss, seconds)


def _train(context: StudyContext, trial: Trial) -> dict[str, Any]:
    """Fit a trial; one whose checkpoints are corrupt starts again.

    Raises:
        ConfigError: A checkpoint cannot be read for another reason, which may pass; nothing was removed.
    """
    run = _folder(context, trial)
    record = read_json(run.logs / "metrics.json")
    if record.get("status") == "finished":
        _thin_out(context.study, trial, run)
        return record
    arguments = arguments_of(context.study, trial, defaults=_defaults())
    reset_peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # not that of all runs before
    begun = [path for name in (LAST, PREVIOUS) if (path := run.checkpoints / name).is_file()]
    if _one_is_whole(begun):
        arguments += ["--ckpt_path", str(run.checkpoints / LAST)]  # where it is corrupt, fit takes the one before
    else:
        if begun:
            print(f"note       {run.checkpoints}: the checkpoints are corrupt, so this trial starts again")
        for folder in (run.logs, run.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
    run.logs.mkdir(parents=True, exist_ok=True)
    facts = {"study": context.study.name, "stage": trial.stage, "arm": trial.arm, "case": trial.case}
    context.train(arguments, run, facts)
    record = read_json(run.logs / "metrics.json")
    if record.get("status") != "finished":
        raise ConfigError(f"the run did not come to its end; {run.logs / 'run.log'} says more.")
    _thin_out(context.study, trial, run)
    return record


def _one_is_whole(checkpoints: Sequence[Path]) -> bool:
    unclear = None
    for checkpoint in checkpoints:
        try:
            read_checkpoint(checkpoint)
        except CorruptCheckpointError:
            continue
        except ConfigError as error:
            unclear = error
        else:
            return True
    if unclear is not None:
        raise unclear
    return False


def _test(context: StudyContext, trial: Trial) -> dict[str, Any]:
    run = _folder(context, trial)
    record = read_json(run.logs / "metrics.json")
    tested = f"test/{context.study.metric}"
    if tested not in record:
        checkpoint = run.checkpoints / f"{context.study.test}.ckpt"
        if not checkpoint.is_file():
            raise ConfigError(
                f"{checkpoint} is not there: when its run ended, the study did not say that it would be tested. Give "
                "the study another --name, and --test from the beginning."
            )
        arguments = ["--ckpt_path", str(checkpoint)]
        root = trial.overrides.get("data.root")
        arguments += [] if root is None else ["--data.root", str(root)]
        context.test(arguments)
        record = read_json(run.logs / "metrics.json")
        if tested not in record:
            raise ConfigError(
                f"its test was not recorded, because the images in {root or 'the folder of the run'}, or their sizes, "
                "are other ones than those of the run; give the --data.root of the run."
            )
    if context.study.keep == "none" and tested in record:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return record


def _thin_out(study: Study, trial: Trial, run: RunFolder) -> None:
    """Keep of a finished run's checkpoints what is needed: the weights that will be tested, or nothing."""
    if trial.stage == "select" or (study.keep == "none" and study.test == "never"):
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        return
    with going_on_without("checkpoints without the optimizer"):
        _thin_checkpoints(study, run)


def _thin_checkpoints(study: Study, run: RunFolder) -> None:
    remove_leftovers(run.checkpoints)
    needed = {study.test, study.keep}
    for path in run.checkpoints.glob("*.ckpt"):
        if path.stem not in needed:
            path.unlink()
        elif (content := read_checkpoint(path))["optimizer_states"]:
            write_checkpoint({**content, "optimizer_states": [], "lr_schedulers": []}, path)


def _folder(context: StudyContext, trial: Trial) -> RunFolder:
    run = RunFolder(f"{context.study.name}/{trial.run}", context.root)
    refuse_links(run)
    return run


def _defaults() -> Sequence[str]:
    """Leave the cores to the compute threads, of which each worker has its share; a GPU leaves them to the data."""
    share = torch.get_num_threads()
    data_workers = choose_num_workers(share, share, on_gpu=torch.cuda.is_available())
    return ["--trainer.enable_progress_bar", "false", "--data.num_workers", str(data_workers)]


def _tidy() -> None:
    """Give memory back, so that a worker stays as small after a hundred trials as after one."""
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
