"""Runs a study: keeps workers busy until all trials have ended, and reports how far it is."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from gn_transfer.config import ConfigError
from gn_transfer.data.workers import core_count
from gn_transfer.study.database import patiently
from gn_transfer.study.planning import Outcome, Planned, plan_trials
from gn_transfer.study.store import Store
from gn_transfer.study.trials import Trial
from gn_transfer.study.worker import IDLE_SECONDS, StudyContext, interrupt, work
from gn_transfer.training.progress import duration

MAX_CRASHES = 3
"""So many workers may die of a trial before it is given up."""

MAX_FAILURES_ALIKE = 5
"""So many trials in a row may fail for the same reason before the study stops: it may be the machine's fault."""

SILENCE_SECONDS = 30.0
"""Without a terminal, a line says at least so often what is running."""


class StudyRunner:
    """Keep workers busy and the user informed until all trials have ended.

    Args:
        store: The study.
        url: Its database, for the workers.
        context: What all trials share.
        workers: How many processes.
        console: The terminal.
    """

    def __init__(self, store: Store, url: str, context: StudyContext, workers: int, console: Console) -> None:
        self.store, self.url, self.context, self.console = store, url, context, console
        self.count = workers
        self.processes = multiprocessing.get_context("spawn")
        self.workers: dict[int, BaseProcess] = {}
        self.pipes: dict[int, Connection] = {}  # closed to have a worker stop
        self.crashes: Counter[str] = Counter()
        self._failures: list[tuple[str, str]] = []  # reason, the same one, and configuration of the newest trials
        self.reported: set[str] = set()
        self._began: dict[str, float] = {}  # running trials
        self._spoken = time.monotonic()

    def run(self, retry_failed: bool) -> tuple[Planned, dict[str, Outcome]]:
        """Enter trials as they become known, until all have ended."""
        study = self.context.study
        planned = plan_trials(study, self.store.outcomes())
        self.store.enter(planned.trials, retry_failed=retry_failed)
        self.reported = {name for name, outcome in self.store.outcomes().items() if outcome.ended}
        with _progress(self.console) as progress, share_threads(core_count() // self.count) as threads:
            task = progress.add_task("trials", total=len(planned.trials), left="")
            progress.console.print(f"plan       {describe_plan(planned, self.count, threads)}", soft_wrap=True)
            try:
                while True:
                    began = time.thread_time()
                    outcomes = patiently(self.store.outcomes, self._say)
                    planned = plan_trials(study, outcomes)
                    # What is reported may stop the study: before its tests are entered, so that none is opened.
                    self._report(progress, task, planned, outcomes)
                    if any(trial.name not in outcomes for trial in planned.trials):
                        patiently(partial(self.store.enter, planned.trials), self._say)
                        continue
                    if all(outcomes[trial.name].ended for trial in planned.trials):
                        return planned, outcomes
                    open_trials = sum(not outcomes[trial.name].ended for trial in planned.trials)
                    patiently(partial(self._keep_workers, open_trials), self._say)
                    # Reading hundreds of trials takes a tenth of a second, from cores on which workers compute.
                    time.sleep(max(IDLE_SECONDS, 30 * (time.thread_time() - began)))
            except BaseException:
                self._say("stopping: running trials save a checkpoint; the same command continues the study")
                for worker in self.workers.values():
                    if worker.pid is not None:
                        interrupt(worker.pid)
                raise
            finally:
                for pipe in self.pipes.values():
                    pipe.close()
                for worker in self.workers.values():
                    worker.join(60)
                    if worker.is_alive():
                        self.console.print(f"{worker.name} did not end within a minute: its trial starts again later")
                    worker.kill()

    def _keep_workers(self, open_trials: int) -> None:
        """Replace workers that have died, and give up a trial that several workers died of."""
        for number, worker in list(self.workers.items()):
            if worker.exitcode is None:
                continue
            assert worker.pid is not None
            trial = self.store.owned_by(worker.pid)
            del self.workers[number]
            self.pipes.pop(number).close()
            log = self._log(number)
            self.crashes[trial or ""] += 1
            if self.crashes[trial or ""] < MAX_CRASHES:
                continue
            if trial is not None:
                times = f"{self.crashes[trial]} times (out of memory?)"
                self.store.fail(trial, f"its worker ended with exit code {worker.exitcode} {times}; see {log}")
            elif self.workers:
                self.count, self.crashes[""] = len(self.workers), 0
                self._say(
                    f"warning: a worker does not start (exit code {worker.exitcode}; see {log}): {self.count} go on"
                )
            else:
                raise ConfigError(f"workers do not start: exit code {worker.exitcode}; see {log}.")
        free = [number for number in range(self.count + len(self.workers)) if number not in self.workers]
        for number in free[: max(0, min(self.count, open_trials) - len(self.workers))]:
            ours, theirs = self.processes.Pipe()
            worker = self.processes.Process(
                target=work, args=(self.url, self.context, theirs, self._log(number)), name=f"worker {number}"
            )
            worker.start()
            theirs.close()
            self.workers[number], self.pipes[number] = worker, ours

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)

    def _check_failures(self, trial: Trial, outcome: Outcome, planned: Planned) -> None:
        """Stop where a fault of the machine, such as a full disk, would fail all trials that are left.

        What fails in one configuration alone, whatever its seed and the value to choose, may be impossible: that is a
        result, and the others go on.
        """
        reason = outcome.reason.replace(trial.run, "")
        alike = [failure for failure in self._failures if failure[0] == reason]
        self._failures = [] if outcome.state == "complete" else [*alike, (reason, self._configuration(trial))]
        if len(self._failures) < MAX_FAILURES_ALIKE:
            return
        alone = len({self._configuration(other) for other in planned.trials}) == 1
        if alone or len({configuration for _, configuration in self._failures}) > 1:
            raise ConfigError(
                f"the study stops, because {len(self._failures)} trials in a row failed for the same reason: "
                f"{outcome.reason} Mend that and give the same command with --retry_failed, or without it to go on "
                "with the other trials."
            )

    def _configuration(self, trial: Trial) -> str:
        chosen = {arm.select.key for arm in self.context.study.arms if arm.select is not None}
        values = {key: value for key, value in trial.identity().items() if key not in {"seed_everything", *chosen}}
        return json.dumps(values, default=str)

    def _log(self, number: int) -> Path:
        return self.context.root / "runs" / self.context.study.name / f"worker-{number}.log"

    def _report(self, progress: StudyProgress, task: TaskID, planned: Planned, outcomes: Mapping[str, Outcome]) -> None:
        ended = [trial for trial in planned.trials if trial.name in outcomes and outcomes[trial.name].ended]
        left = time_left(planned, outcomes, self.count)
        total = len(planned.trials) + planned.to_come
        fresh = [trial for trial in ended if trial.name not in self.reported]
        for number, trial in enumerate(fresh, len(ended) - len(fresh) + 1):
            outcome = outcomes[trial.name]
            split = "test" if trial.stage == "test" else "val"
            result = (
                f"{split}/{self.context.study.metric} {outcome.value:.3f}"
                if outcome.state == "complete"
                else "failed: " + outcome.reason
            )
            progress.console.print(
                f"{number}/{total}  {trial.name}  {result}  {duration(outcome.seconds)}", markup=False
            )
            self._spoken = time.monotonic()
            self.reported.add(trial.name)
            self.crashes.pop("", None)
            self._check_failures(trial, outcome, planned)
        for choice in map(str, planned.choices):
            if choice not in self.reported:
                progress.console.print(f"chosen  {choice}", markup=False)
                self.reported.add(choice)
        shown = "" if left is None else f"about {duration(left)} left"
        progress.running = self._running(outcomes)
        progress.update(task, completed=len(ended), total=total, left=shown)
        if not self.console.is_terminal and time.monotonic() - self._spoken > SILENCE_SECONDS and progress.running:
            self._spoken = time.monotonic()
            rest = f"; {len(ended)}/{total} done" + (f", {shown}" if shown else "")
            self.console.print(f"running  {progress.running}{rest}", soft_wrap=True, markup=False)

    def _running(self, outcomes: Mapping[str, Outcome]) -> str:
        """Name the running trials and for how long they have run."""
        now = time.monotonic()
        running = [name for name, outcome in outcomes.items() if outcome.state == "running"]
        self._began = {name: self._began.get(name, now) for name in running}
        return ", ".join(f"{name} ({duration(now - began)})" for name, began in self._began.items())


def describe_plan(planned: Planned, workers: int, threads: int) -> str:
    """Say in a line what a study is going to do.

    Args:
        planned: Its trials as far as they are known.
        workers: Processes that share them.
        threads: Compute threads of each.
    """
    stages = Counter(trial.stage for trial in planned.trials)
    counts = ", ".join(f"{count} {stage}" for stage, count in stages.items())
    more = f" and {planned.to_come} to come" if planned.to_come else ""
    return (
        f"{len(planned.trials)} trials{more} ({counts}); {workers} worker{'s' * (workers != 1)} with {threads} "
        f"thread{'s' * (threads != 1)} each"
    )


def time_left(planned: Planned, outcomes: Mapping[str, Outcome], workers: int) -> float | None:
    """Estimate the time until a study is done from the trials that are.

    Args:
        planned: The plan so far.
        outcomes: What became of its trials.
        workers: Processes that share the rest.

    Returns:
        Seconds; None before the first trial has ended. A trial is taken to last as long as those of its arm and case,
        and a test as nearly nothing before the first.
    """
    times: dict[tuple[str, str, bool], list[float]] = {}
    for trial in planned.trials:
        if trial.name in outcomes and outcomes[trial.name].state == "complete":
            times.setdefault((trial.arm, trial.case, trial.stage == "test"), []).append(outcomes[trial.name].seconds)
    if not times:
        return None
    means = {
        is_test: fmean([s for (_, _, tested), some in times.items() if tested == is_test for s in some] or [0.0])
        for is_test in (False, True)
    }
    seconds = sum(
        fmean(times.get((trial.arm, trial.case, trial.stage == "test"), [means[trial.stage == "test"]]))
        for trial in planned.trials
        if not (trial.name in outcomes and outcomes[trial.name].ended)
    )
    trainings = planned.to_come - planned.tests_to_come
    return (seconds + means[False] * trainings + means[True] * planned.tests_to_come) / workers


class StudyProgress(Progress):
    """The bar of a study, and below it what is running.

    Attributes:
        running: The running trials, or empty.
    """

    running = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Give the bar and the line below it."""
        yield from super().get_renderables()
        if self.running:
            yield Text(f"running  {self.running}", overflow="ellipsis", no_wrap=True)


def _progress(console: Console) -> StudyProgress:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("trials"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    return StudyProgress(*columns, console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def share_threads(share: int) -> Iterator[int]:
    """Give workers their share of the cores, or less where the user said so."""
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
