"""What a study does when a worker dies, the database is away, or the machine fails every trial."""

from __future__ import annotations

import io
import multiprocessing
import os
import sqlite3
import threading
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.storages._rdb.models import BaseModel
from rich.console import Console

from gn_transfer.config import ConfigError
from gn_transfer.study import database, runner, store
from gn_transfer.study.database import UnreachableDatabaseError, patiently
from gn_transfer.study.definition import Study, read_study
from gn_transfer.study.planning import Outcome, Planned, foresee, plan_trials
from gn_transfer.study.runner import MAX_CRASHES, MAX_FAILURES_ALIKE, StudyRunner, time_left
from gn_transfer.study.store import Store
from gn_transfer.study.worker import StopWithParent, StudyContext, run_trials

GONE = 2**22 + 7  # no process has this number


@pytest.fixture
def study(tmp_path) -> Study:
    path = tmp_path / "sweep_x.yaml"
    path.write_text("base: sample_gnws.yaml\ngrid: {model.norm: [bn, gn]}\nseeds: 3\n")
    return read_study(path)


@pytest.fixture
def opened(study, tmp_path) -> Store:
    found = Store(f"sqlite:///{tmp_path / 'study.db'}", study.name)
    found.begin(study.shared_settings())
    return found


class Worker:
    """Looks like a process: it has ended, or it has not."""

    def __init__(self, exitcode: int | None, pid: int = GONE) -> None:
        self.exitcode, self.pid, self.name = exitcode, pid, "worker"
        self.killed = False

    def start(self) -> None:
        pass

    def join(self, timeout: float) -> None:
        pass

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.killed = True


class Processes:
    """Looks like a context of multiprocessing, and gives the workers of a list."""

    Pipe = staticmethod(multiprocessing.Pipe)

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers

    def Process(self, **_: object) -> Worker:  # noqa: N802 - its name in multiprocessing
        return self.workers.pop(0)


def runner_of(study: Study, opened: Store, workers: list[Worker], tmp_path: Path, count: int = 2) -> StudyRunner:
    context = StudyContext(study, tmp_path, lambda *_: None, lambda *_: None)
    found = StudyRunner(opened, "", context, count, Console(file=io.StringIO(), width=200))
    found.processes = Processes(workers)
    return found


def said(of: StudyRunner) -> str:
    return of.console.file.getvalue()


def test_a_database_that_is_away_for_a_moment_is_waited_for(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(database.time, "sleep", pauses.append)
    answers = iter([UnreachableDatabaseError("away."), UnreachableDatabaseError("away."), 7])

    def ask() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lines: list[str] = []
    assert patiently(ask, lines.append) == 7
    assert pauses == [1.0, 2.0]
    assert lines == ["warning: away. It is tried again for 5 minutes."]


def test_a_database_that_stays_away_ends_the_study(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(database.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(database.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def ask() -> int:
        raise UnreachableDatabaseError("away.")

    with pytest.raises(UnreachableDatabaseError):
        patiently(ask, lambda line: None)
    assert 250 < now[0] <= database.PATIENCE_SECONDS


def test_what_the_database_cannot_do_now_is_told_from_what_it_never_will(opened, tmp_path):
    with pytest.raises(UnreachableDatabaseError, match=r"cannot be used \(server closed"), opened._explain_errors():
        raise sqlalchemy.exc.OperationalError("SELECT", {}, Exception("server closed"))
    (tmp_path / "study.db").write_bytes(b"not a database, but long enough to be read as a header of one")
    with pytest.raises(ConfigError, match="file is not a database") as found:
        opened.outcomes()
    assert not isinstance(found.value, UnreachableDatabaseError)


def test_any_error_interrupts_the_workers(study, opened, tmp_path, monkeypatch):
    interrupted: list[int] = []
    monkeypatch.setattr(runner, "interrupt", interrupted.append)
    monkeypatch.setattr(database, "PATIENCE_SECONDS", 0.0)
    worker = Worker(None, os.getpid())
    found = runner_of(study, opened, [worker], tmp_path, count=1)
    ask, answers = opened.outcomes, iter(range(4))

    def outcomes() -> dict[str, Outcome]:
        if next(answers) == 3:
            raise UnreachableDatabaseError("away.")
        return ask()

    monkeypatch.setattr(opened, "outcomes", outcomes)
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    with pytest.raises(UnreachableDatabaseError):
        found.run(retry_failed=False)
    assert interrupted == [os.getpid()]
    assert worker.killed
    assert "running trials save a checkpoint" in said(found)


def idle(connection) -> None:
    stop = StopWithParent(connection)
    while not stop.wait(0.05):
        pass


def test_a_worker_stops_with_the_command_and_one_that_was_killed_holds_nobody_up():
    spawn = multiprocessing.get_context("spawn")
    pairs = [spawn.Pipe() for _ in range(2)]
    workers = [spawn.Process(target=idle, args=(theirs,)) for _, theirs in pairs]
    for worker, (_, theirs) in zip(workers, pairs, strict=True):
        worker.start()
        theirs.close()
    workers[0].kill()
    workers[0].join(60)
    assert workers[1].is_alive()
    for ours, _ in pairs:
        ours.close()
    workers[1].join(60)
    assert [worker.exitcode for worker in workers] == [-9, 0]


def test_a_stop_is_seen_before_and_while_waiting():
    ours, theirs = multiprocessing.Pipe()
    stop = StopWithParent(theirs)
    assert not stop.is_set()
    assert not stop.wait(0.0)
    ours.close()
    assert stop.is_set()
    assert stop.wait(60.0)


def test_workers_that_do_not_start_are_done_without(study, opened, tmp_path):
    alive = Worker(None)
    found = runner_of(study, opened, [alive, *(Worker(1) for _ in range(MAX_CRASHES))], tmp_path)
    for _ in range(MAX_CRASHES + 1):
        found._keep_workers(6)
    assert list(found.workers.values()) == [alive]
    assert found.count == 1
    assert "a worker does not start (exit code 1" in said(found)
    found._keep_workers(6)  # there would be no more of them
    assert list(found.workers.values()) == [alive]


def test_without_any_worker_the_study_ends(study, opened, tmp_path):
    found = runner_of(study, opened, [Worker(1) for _ in range(10)], tmp_path, count=1)
    for _ in range(MAX_CRASHES):
        found._keep_workers(6)
    with pytest.raises(ConfigError, match="workers do not start: exit code 1"):
        found._keep_workers(6)


def test_no_more_workers_than_open_trials(study, opened, tmp_path):
    found = runner_of(study, opened, [Worker(None) for _ in range(5)], tmp_path, count=4)
    found._keep_workers(1)
    assert list(found.workers) == [0]
    found._keep_workers(3)
    assert list(found.workers) == [0, 1, 2]


def claim_as(opened: Store, pid: int, trials, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(store, "_me", lambda: {"host": store._host(), "pid": pid, "started": "1"})
        return opened.claim(trials)


def test_a_trial_that_kills_its_workers_is_given_up_even_if_others_take_it_over_at_once(
    study, opened, tmp_path, monkeypatch
):
    trials = {trial.name: trial for trial in plan_trials(study, {}).trials[:1]}
    [name] = trials
    opened.enter(list(trials.values()))
    found = runner_of(study, opened, [Worker(None) for _ in range(9)], tmp_path)
    for number in range(MAX_CRASHES):
        assert claim_as(opened, GONE + number, trials, monkeypatch).trial.name == name
        other = opened.claim(trials)  # which lives, before the runner looks
        assert other.trial.name == name
        assert opened.owned_by(GONE + number) == name
        found.workers, found.pipes = {0: Worker(-9, GONE + number)}, {0: multiprocessing.Pipe()[0]}
        found._keep_workers(1)
        assert opened.outcomes()[name].state == "running"  # the other one may still end it
        died = {"host": store._host(), "pid": GONE + 100, "started": "1"}
        opened._storage.set_trial_user_attr(other.trial_id, "owner", died)
    assert claim_as(opened, GONE + 200, trials, monkeypatch) is None
    outcome = opened.outcomes()[name]
    assert outcome.state == "failed"
    assert "ended with exit code -9 3 times (out of memory?)" in outcome.reason


def test_a_given_up_trial_that_ends_well_counts(study, opened):
    trials = {trial.name: trial for trial in plan_trials(study, {}).trials[:1]}
    [name] = trials
    opened.enter(list(trials.values()))
    claim = opened.claim(trials)
    opened.fail(name, "its workers died")
    assert opened.finish(claim, Outcome("complete", 0.5, 1.0))
    assert opened.outcomes()[name].state == "complete"


def test_deaths_between_trials_do_not_add_up_over_days(study, opened, tmp_path):
    planned = plan_trials(study, {})
    opened.enter(planned.trials)
    workers = [Worker(None) for _ in range(9)]
    found = runner_of(study, opened, workers, tmp_path, count=1)
    outcomes = dict.fromkeys((trial.name for trial in planned.trials), Outcome("waiting"))
    with runner._progress(found.console) as progress:
        task = progress.add_task("trials", total=6, left="")
        for number in range(2 * MAX_CRASHES):
            found.workers, found.pipes = {0: Worker(-9)}, {0: multiprocessing.Pipe()[0]}
            found._keep_workers(6)
            outcomes[planned.trials[number].name] = Outcome("complete", 0.5, 1.0)
            found._report(progress, task, planned, outcomes)
    assert found.count == 1


def test_the_same_failure_again_and_again_stops_the_study(study, opened, tmp_path):
    trials = plan_trials(study, {}).trials
    found = runner_of(study, opened, [], tmp_path)
    failed = [Outcome("failed", reason=f"runs/{trial.run} cannot be written") for trial in trials]
    planned = Planned(trials=trials)
    for _ in range(2):
        for trial, outcome in zip(trials[: MAX_FAILURES_ALIKE - 1], failed, strict=False):
            found._check_failures(trial, outcome, planned)
        found._check_failures(trials[0], Outcome("complete", 0.5, 1.0), planned)
    for number, trial in enumerate(trials):
        found._check_failures(trial, Outcome("failed", reason=f"nan at step {number}"), planned)
    for trial, outcome in zip(trials[: MAX_FAILURES_ALIKE - 1], failed, strict=False):
        found._check_failures(trial, outcome, planned)
    with pytest.raises(ConfigError, match=r"5 trials in a row failed for the same reason: runs/.* --retry_failed"):
        found._check_failures(trials[-1], failed[-1], planned)


def test_a_configuration_that_is_impossible_does_not_stop_the_others(tmp_path, opened):
    path = tmp_path / "sweep_x.yaml"
    path.write_text("base: sample_gnws.yaml\ngrid: {model.norm: [bn, gn]}\nselect: {values: [1, 2, 3, 4]}\nseeds: 3\n")
    study = read_study(path)
    found, planned = runner_of(study, opened, [], tmp_path), plan_trials(study, {})
    impossible = [trial for trial in planned.trials if trial.overrides["model.norm"] == "bn"]
    assert len(impossible) > 2 * MAX_FAILURES_ALIKE
    for trial in impossible:
        found._check_failures(trial, Outcome("failed", reason="cannot be trained"), planned)
    [other, *_] = [trial for trial in planned.trials if trial not in impossible]
    with pytest.raises(ConfigError, match="13 trials in a row failed"):
        found._check_failures(other, Outcome("failed", reason="cannot be trained"), planned)
    alone = runner_of(study, opened, [], tmp_path)
    with pytest.raises(ConfigError, match="5 trials in a row failed"):  # there are no others
        fail_all(alone, impossible)


def fail_all(found: StudyRunner, trials) -> None:
    for trial in trials:
        found._check_failures(trial, Outcome("failed", reason="cannot be trained"), Planned(trials=trials))


def test_no_test_is_entered_when_the_study_stops(tmp_path, opened, monkeypatch):
    path = tmp_path / "sweep_x.yaml"
    path.write_text("base: sample_gnws.yaml\ngrid: {model.norm: [bn, gn]}\nseeds: 4\ntest: last\n")
    study = read_study(path)
    found = runner_of(study, opened, [Worker(None)], tmp_path, count=1)

    def work(open_trials: int) -> None:
        for number, trial in enumerate(plan_trials(study, opened.outcomes()).trials):
            claim = opened.claim({trial.name: trial})
            done = Outcome("complete", 0.5, 1.0) if number < 3 else Outcome("failed", reason="the disk is full")
            opened.finish(claim, done)

    monkeypatch.setattr(found, "_keep_workers", work)
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    with pytest.raises(ConfigError, match="the disk is full"):
        found.run(retry_failed=False)
    assert not any(name.startswith("test-") for name in opened.outcomes())


def test_a_claim_whose_answer_was_lost_is_given_again(study, opened, monkeypatch):
    trials = {trial.name: trial for trial in plan_trials(study, {}).trials}
    opened.enter(list(trials.values()))
    locked, failing = opened._locked, iter([True])

    @contextmanager
    def unsafe():
        with locked():
            yield
        if next(failing, False):
            raise sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("server closed"))

    monkeypatch.setattr(opened, "_locked", unsafe)
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    claim = patiently(lambda: opened.claim(trials), lambda line: None)
    assert claim.trial.name == next(iter(trials))
    assert sum(outcome.state == "running" for outcome in opened.outcomes().values()) == 1


def test_a_worker_waits_for_the_database(study, opened, monkeypatch):
    monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
    trials = plan_trials(study, {}).trials
    opened.enter(trials)
    stop, away = threading.Event(), iter(range(100))

    def sometimes(action):
        def ask(*arguments):
            if next(away) % 2:
                raise UnreachableDatabaseError("away.")
            return action(*arguments)

        return ask

    for name in ("outcomes", "claim", "finish"):
        monkeypatch.setattr(opened, name, sometimes(getattr(opened, name)))
    ran: list[str] = []

    def run(trial) -> Outcome:
        ran.append(trial.name)
        if len(ran) == len(trials):
            stop.set()
        return Outcome("complete", 0.5, 1.0)

    run_trials(opened, study, run, stop)
    assert ran == [trial.name for trial in trials]


def test_tests_are_not_taken_for_trainings(study):
    trials = plan_trials(study, {}).trials
    outcomes = {trials[0].name: Outcome("complete", 0.5, 1.0, seconds=300.0)}
    planned = Planned(trials=trials, to_come=6, tests_to_come=6)
    assert time_left(planned, outcomes, workers=1) == 5 * 300
    assert time_left(Planned(trials=trials, to_come=2), outcomes, workers=2) == (5 + 2) * 300 / 2


def test_what_has_ended_is_foreseen_as_it_ended(tmp_path):
    path = tmp_path / "sweep_y.yaml"
    path.write_text("base: sample_gnws.yaml\nselect: {values: [0.1, 0.2, 0.4], seeds: 1, extend: 0}\ntest: last\n")
    study = read_study(path)
    outcomes = {trial.name: Outcome("complete", "lr0.1" in trial.name, 1.0) for trial in plan_trials(study, {}).trials}
    assert [t.overrides["optimizer.lr"] for t in foresee(study).trials if t.stage != "select"] == [0.2, 0.2]
    assert [t.overrides["optimizer.lr"] for t in foresee(study, outcomes).trials if t.stage != "select"] == [0.1, 0.1]


@pytest.mark.parametrize("names", [["studies"], ["studies", "version_info", "trials"]])
def test_a_database_whose_layout_was_interrupted_is_laid_out(study, tmp_path, names):
    url = f"sqlite:///{tmp_path / 'half.db'}"
    BaseModel.metadata.create_all(
        sqlalchemy.create_engine(url), tables=[BaseModel.metadata.tables[name] for name in names]
    )
    assert Store(url, study.name).begin(study.shared_settings())
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE studies (x INTEGER)")
        connection.execute("CREATE TABLE birds (x INTEGER)")
    with pytest.raises(ConfigError, match="holds tables of another program"):
        Store(f"sqlite:///{tmp_path / 'other.db'}", study.name)


def test_a_study_that_was_killed_before_its_mark_goes_on(study, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    empty = optuna.create_study(storage=url, study_name=study.name, direction="maximize")
    found = Store(url, study.name)
    found.begin(study.shared_settings())
    assert empty.user_attrs[store._MARK]
    other = optuna.create_study(storage=url, study_name="other", direction="maximize")
    other.enqueue_trial({"x": 1})
    with pytest.raises(ConfigError, match="is not gn-transfer's"):
        Store(url, "other").begin(study.shared_settings())


def test_the_metric_follows_the_data_that_a_study_sets(tmp_path):
    path = tmp_path / "sweep_z.yaml"
    path.write_text("base: sample_gnws.yaml\nset: {data: PetsSegmentation}\ngrid: {model.norm: [bn, gn]}\n")
    assert read_study(path).metric == "miou"
    path.write_text("base: sample_gnws.yaml\ngrid: {model.norm: [bn, gn]}\n")
    assert read_study(path).metric == "acc1"
    assert read_study(path, overrides={"data": "SegmentationFolder"}).metric == "miou"
