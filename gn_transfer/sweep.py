"""The verb ``sweep``: plans a study, has workers run its cells, and writes what they came to."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from gn_transfer import cli
from gn_transfer.arguments import Arguments
from gn_transfer.backbones import resolve_pretrained
from gn_transfer.classifier import TransferClassifier
from gn_transfer.comparison.runs import short_name
from gn_transfer.config import ConfigError, did_you_mean, find_config
from gn_transfer.data.base import core_count
from gn_transfer.loggers import RunLog
from gn_transfer.plan import duration
from gn_transfer.study.cells import Cell
from gn_transfer.study.definition import Study, parse_value, read_study
from gn_transfer.study.planning import Outcome, Planned, foresee, plan_cells
from gn_transfer.study.serve import IDLE_SECONDS
from gn_transfer.study.store import Store
from gn_transfer.study.worker import Bench, interrupt, work

STUDY_KEYS = ("samples", "seeds", "test", "keep")
_WEIGHTS_FOLLOW = ("model.backbone", "model.norm", "model.pretrained", "model.conversion")
MAX_CRASHES = 3
"""So many workers may die of a cell before it is given up."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: What stands behind it.

    Returns:
        Exit code: 0 done, 3 where cells failed.

    Raises:
        ConfigError: The user's mistake.
        KeyboardInterrupt: Interrupted; the same command goes on.
    """
    options, overrides = _parse(arguments)
    study = read_study(find_config(options.config), name=options.name, overrides=overrides)
    _check_keys(study)
    foreseen = foresee(study)
    check_values(study, foreseen.cells)
    console = Console(highlight=False)
    if options.dry_run:
        print_plan(console, study, foreseen.cells, options.workers)
        return 0
    known = {**study.settings, **overrides}
    bench = Bench(study, Path(known.get("trainer.default_root_dir") or "."))
    folder = bench.root / "runs" / study.name
    url = options.storage or f"sqlite:///{folder / 'study.db'}"
    store = Store(url, study.name)
    if not store.knows_study() and (found := next(folder.glob("*/metrics.json"), None)):
        raise ConfigError(
            f"{found.parent} is a run, and the database of the study {study.name} knows nothing of it; move {folder} "
            "away, or choose another --name."
        )
    store.begin(study.shared_settings())
    folder.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems ask in this way
    try:
        planned, outcomes = _Foreman(store, url, bench, options.workers, console).run(options.retry_failed)
    finally:
        signal.signal(signal.SIGTERM, before)
        store.close()
    return _conclude(console, bench, planned, outcomes)


class _Foreman:
    """Keeps workers busy and the user informed until nothing is left to do.

    Args:
        store: The study.
        url: Its database, for the workers.
        bench: What all cells share.
        workers: How many processes.
        console: The terminal.
    """

    def __init__(self, store: Store, url: str, bench: Bench, workers: int, console: Console) -> None:
        self.store, self.url, self.bench, self.console = store, url, bench, console
        self.count = workers
        self.context = multiprocessing.get_context("spawn")
        self.stop = self.context.Event()
        self.workers: dict[int, BaseProcess] = {}
        self.crashes: Counter[str] = Counter()
        self.told: set[str] = set()

    def run(self, retry_failed: bool) -> tuple[Planned, dict[str, Outcome]]:
        """Enter cells as they become known, until all have ended."""
        study = self.bench.study
        planned = plan_cells(study, self.store.outcomes())
        self.store.enter(planned.cells, retry_failed=retry_failed)
        with _progress(self.console) as progress, _threads(core_count() // self.count):
            task = progress.add_task("cells", total=len(planned.cells), left="")
            try:
                while True:
                    began = time.thread_time()
                    outcomes = self.store.outcomes()
                    planned = plan_cells(study, outcomes)
                    if any(cell.name not in outcomes for cell in planned.cells):
                        self.store.enter(planned.cells)
                        continue
                    self._tell(progress, task, planned, outcomes)
                    if all(outcomes[cell.name].ended for cell in planned.cells):
                        return planned, outcomes
                    self._employ(sum(not outcomes[cell.name].ended for cell in planned.cells))
                    # Reading hundreds of cells takes a tenth of a second, from cores on which workers compute.
                    self.stop.wait(max(IDLE_SECONDS, 30 * (time.thread_time() - began)))
            except KeyboardInterrupt:
                self.console.print("stopping: the cells at hand are saved; the same command goes on")
                for worker in self.workers.values():
                    if worker.pid is not None:
                        interrupt(worker.pid)
                raise
            finally:
                self.stop.set()
                for worker in self.workers.values():
                    worker.join(60)
                    worker.kill()

    def _employ(self, open_cells: int) -> None:
        """Replace workers that have died, and give up a cell of which several do."""
        for number, worker in list(self.workers.items()):
            if worker.exitcode is None:
                continue
            del self.workers[number]
            assert worker.pid is not None
            cell = self.store.owned_by(worker.pid)
            log = self._log(number)
            self.crashes[cell or ""] += 1
            if self.crashes[cell or ""] < MAX_CRASHES:
                continue
            reason = (
                f"its worker ended with exit code {worker.exitcode} {MAX_CRASHES} times (out of memory?); see {log}"
            )
            if cell is None:
                raise ConfigError(f"workers do not start: exit code {worker.exitcode}; see {log}.")
            self.store.fail(cell, reason)
        for number in range(min(self.count, open_cells)):
            if number not in self.workers:
                worker = self.context.Process(
                    target=work, args=(self.url, self.bench, self.stop, self._log(number)), name=f"worker {number}"
                )
                worker.start()
                self.workers[number] = worker

    def _log(self, number: int) -> Path:
        return self.bench.root / "runs" / self.bench.study.name / f"worker-{number}.log"

    def _tell(self, progress: Progress, task: TaskID, planned: Planned, outcomes: Mapping[str, Outcome]) -> None:
        ended = [cell for cell in planned.cells if outcomes[cell.name].ended]
        left = time_left(planned, outcomes, self.count)
        total = len(planned.cells) + planned.to_come
        first = not self.told
        for cell in ended:
            if cell.name not in self.told and not (first and len(ended) > 1):
                outcome = outcomes[cell.name]
                split = "test" if cell.stage == "test" else "val"
                said = (
                    f"{split}/acc1 {outcome.accuracy:.3f}"
                    if outcome.state == "complete"
                    else "failed: " + outcome.reason
                )
                progress.console.print(
                    f"{len(ended)}/{total}  {cell.name}  {said}  {duration(outcome.seconds)}", markup=False
                )
            self.told.add(cell.name)
        for choice in map(str, planned.choices):
            if choice not in self.told:
                progress.console.print(f"chosen  {choice}", markup=False)
                self.told.add(choice)
        shown = "" if left is None else f"about {duration(left)} left"
        progress.update(task, completed=len(ended), total=total, left=shown)


def time_left(planned: Planned, outcomes: Mapping[str, Outcome], workers: int) -> float | None:
    """Estimate the time until a study is done from the cells that are.

    Args:
        planned: The plan so far.
        outcomes: What became of its cells.
        workers: Processes that share the rest.

    Returns:
        Seconds; None before the first cell has ended. A cell is taken to last as long as those of its arm and case.
    """
    times: dict[tuple[str, str, bool], list[float]] = {}
    for cell in planned.cells:
        if cell.name in outcomes and outcomes[cell.name].state == "complete":
            times.setdefault((cell.arm, cell.case, cell.stage == "test"), []).append(outcomes[cell.name].seconds)
    if not times:
        return None
    mean = fmean(seconds for some in times.values() for seconds in some)
    seconds = sum(
        fmean(times.get((cell.arm, cell.case, cell.stage == "test"), [mean]))
        for cell in planned.cells
        if not (cell.name in outcomes and outcomes[cell.name].ended)
    )
    return (seconds + mean * planned.to_come) / workers


def print_plan(console: Console, study: Study, cells: Sequence[Cell], workers: int) -> None:
    """Print the cells and how long they will take.

    Args:
        console: The terminal.
        study: The study.
        cells: All that it will have.
        workers: Processes that share them.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.stage != "test":
            groups.setdefault((cell.stage, cell.name.rpartition("-seed")[0]), []).append(cell)
    table = Table("stage", "cells", "seeds", "each", box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    total, measured = 0.0, dict[str, float]()
    with _threads(core_count() // workers) as threads:
        torch.set_num_threads(threads)  # a cell is timed with the threads that it will have
        for (stage, name), some in groups.items():
            each = _seconds(study, some[0], measured)
            total += each * len(some)
            seeds = " ".join(str(cell.overrides["seed_everything"]) for cell in some)
            table.add_row(stage, name, seeds, duration(each))
    console.print(table)
    stages = Counter(cell.stage for cell in cells)
    console.print(
        f"{len(cells)} cells ({', '.join(f'{count} {stage}' for stage, count in stages.items())}); about "
        f"{duration(total / workers)} of training steps with {workers} worker{'s' * (workers > 1)}; start, validation "
        "and test come on top, a second or two for each cell."
    )
    for block in study.arms:
        if (select := block.select) is not None:
            console.print(
                f"{block.name or study.name}: {select.key} is chosen on validation from "
                f"{', '.join(f'{value:g}' for value in select.values)}; each time the best is the first or the "
                f"last, one more is tried (up to {select.extend}). Final cells are shown with the middle one."
            )


def _seconds(study: Study, cell: Cell, measured: dict[str, float]) -> float:
    """Measure how long a cell trains, once for all that differ in seed or learning rate only."""
    skipped = ("seed_everything", "model.lr", "model.head_lr")
    key = str({name: value for name, value in cell.identity().items() if name not in skipped})
    if key not in measured:
        made: list[cli.Command] = []

        def keep(given: Arguments) -> cli.Command:
            made.append(_Silent(given))
            return made[0]

        cli.run("fit", ["--config", str(study.base), *cell.arguments(), "--dry_run"], keep)
        assert made[0].plan is not None
        measured[key] = made[0].plan.seconds
    return measured[key]


class _Silent(cli.Command):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments, log=RunLog(Console(quiet=True)))


class _Check(cli.Command):
    """Reads a configuration, builds the model's description and looks its weights up, no more."""

    def instantiate_classes(self) -> None:
        model = TransferClassifier(**self._section().model.as_dict())
        resolve_pretrained(model.backbone, model.norm, model.pretrained, model.conversion)

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave it at that."""


def check_values(study: Study, cells: Sequence[Cell]) -> None:
    """Read the configurations of enough cells to have seen each value of each key, and each case.

    Args:
        study: The study.
        cells: Its cells.

    Raises:
        ConfigError: A value that is not allowed, or no weights for a net and its norm, with the cell that has it.
    """
    seen: set[tuple[str, ...]] = set()
    for cell in cells:
        pairs: set[tuple[str, ...]] = {
            (key, str(value)) for key, value in cell.identity().items() if key != "seed_everything"
        }
        pairs |= {(cell.arm, cell.case), tuple(str(cell.overrides.get(key)) for key in _WEIGHTS_FOLLOW)}
        if pairs <= seen:
            continue
        seen |= pairs
        try:
            cli.run("fit", ["--config", str(study.base), *cell.arguments()], _Check)
        except ConfigError as error:
            raise ConfigError(f"{study.name}: cell {cell.name}: {error}") from error


def _conclude(console: Console, bench: Bench, planned: Planned, outcomes: Mapping[str, Outcome]) -> int:
    """Write the report over the final runs, and list what failed."""
    study = bench.study
    folder = bench.root / "runs" / study.name
    runs = [
        folder / cell.name
        for cell in planned.cells
        if cell.stage == "final" and outcomes[cell.name].state == "complete" and (folder / cell.name).is_dir()
    ]
    choices = [str(choice) for choice in planned.choices]
    if runs:
        notes = [*study.notes, *choices]
        try:
            report = write_report(runs, folder / "report", study.baseline, study.title, notes)
        except ConfigError as error:
            console.print(f"no report: {error}", soft_wrap=True, markup=False)
        else:
            width = console.width if console.is_terminal else None
            console.print(report.terminal(width), soft_wrap=True, markup=False)
            console.print(f"report     {folder / 'report'}", soft_wrap=True)
    failed = [cell for cell in planned.cells if outcomes[cell.name].state == "failed"]
    for cell in failed:
        console.print(f"failed     {cell.name}: {outcomes[cell.name].reason}", markup=False)
    for problem in planned.problems:
        console.print(f"failed     {problem}", markup=False)
    if failed:
        console.print("--retry_failed runs failed cells again")
    return 3 if failed or planned.problems else 0


def write_report(
    runs: Sequence[Path], output: Path, baseline: Mapping[str, str], title: str, notes: Sequence[str]
) -> Any:
    """Compare the final runs, without contrasts where the baseline is not among them.

    What that imports is imported only now. A study may vary what else would not be compared: the page says so.
    """
    from gn_transfer import comparison

    try:
        return comparison.write_report(runs, output, baseline=baseline or None, title=title, notes=notes, force=True)
    except ConfigError as error:
        if not baseline:
            raise
        notes = [*notes, f"No contrasts: {error}"]
        return comparison.write_report(runs, output, baseline={}, title=title, notes=notes, force=True)


def _check_keys(study: Study) -> None:
    """Refuse keys that no configuration has.

    Raises:
        ConfigError: With the key and what is near.
    """
    known = ["data", *cli.known_keys()]
    named: set[str] = set()
    for arm in study.arms:
        named |= {*arm.fixed, *arm.grid, *arm.where}
        named |= {key for values in arm.cases.values() for key in values}
        named |= {key for condition in arm.where.values() for key in condition}
        if arm.select is not None:
            named |= {arm.select.key, *(arm.select.per or ())}
    shorts = sorted({short_name(name) for name in known})
    for key in study.baseline:
        if (short := short_name(key)) not in shorts:
            raise ConfigError(f"{study.name}: baseline {key} is not a key; {did_you_mean(short, shorts)}.")
    for key in sorted(named):
        if key in ("seed_everything", "samples"):
            raise ConfigError(
                f"{study.name}: {key} is not set by set, grid or cases; use {key.split('_')[0]}s of the study."
            )
        if key not in known:
            section = [name for name in known if name.split(".")[0] == key.split(".")[0]]
            raise ConfigError(f"{study.name}: {key} is not a key; {did_you_mean(key, section or known)}.")


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="gn-transfer sweep",
        description="Run a study over configuration keys. A killed study goes on with the same command.",
        epilog="Any other --KEY VALUE holds in every cell (--data.root PATH); --samples, --seeds, --test and "
        "--keep replace those of the file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", required=True, help="a study: a path, or the name of a built-in one")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cores (default 1)")
    parser.add_argument("--storage", help="SQLAlchemy URL of the database (default runs/STUDY/study.db)")
    parser.add_argument("--name", help="name of the study and of its folder (default: the file's)")
    parser.add_argument("--retry_failed", action="store_true", help="run cells again that have failed")
    parser.add_argument("--dry_run", action="store_true", help="print the cells and how long they will take, and stop")
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"sweep: {error}.") from error
    if not 1 <= options.workers <= core_count():
        raise ConfigError(f"--workers {options.workers}: use 1 to {core_count()}, the cores of this machine.")
    return options, dict(_pairs(rest))


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--"):
            raise ConfigError(f"sweep: {word!r} belongs to no option; write --KEY VALUE.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            found = next(remaining, None)
            if found is None:
                raise ConfigError(f"sweep: --{key} lacks its value.")
            value = found
        try:
            yield key, parse_value(value)
        except yaml.YAMLError:
            raise ConfigError(f"sweep: --{key} {value} is not a value that YAML can read; quote it.") from None


@contextmanager
def _threads(share: int) -> Iterator[int]:
    """Hand workers their share of the cores, or less where the user said so."""
    before = os.environ.get("OMP_NUM_THREADS")
    allowed = int(before) if before and before.isdigit() else share
    threads = max(1, min(share, allowed))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield threads
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _progress(console: Console) -> Progress:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cells"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
