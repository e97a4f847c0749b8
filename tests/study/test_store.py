"""One trial per trial, whoever starts, claims, dies or comes back; on SQLite and on a PostgreSQL of our own."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from gn_transfer.config import ConfigError
from gn_transfer.study import store as store_module
from gn_transfer.study.definition import Study, read_study
from gn_transfer.study.planning import Outcome, plan_trials
from gn_transfer.study.store import Store

CLAIMER = Path(__file__).with_name("claimer.py")
GRID = """
base: sample_gnws.yaml
grid: {model.norm: [none, bn, gn], data.batch_size: [1, 2, 4, 8]}
seeds: 2
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "sweep_grid.yaml"
    path.write_text(GRID)
    return path


@pytest.fixture
def study(file) -> Study:
    return read_study(file)


def start(url: str, file: Path, log: Path, seconds: float = 0.02) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(CLAIMER), url, str(file), str(log), str(seconds)])


def trials(url: str, study: Study) -> list[optuna.trial.FrozenTrial]:
    store = Store(url, study.name)
    store.begin(study.shared_settings())
    found = store._study.get_trials()
    store.close()
    return found


def check_each_once(url: str, study: Study) -> None:
    found = trials(url, study)
    assert Counter(trial.user_attrs["trial"] for trial in found) == Counter(
        c.name for c in plan_trials(study, {}).trials
    )
    assert {trial.state for trial in found} == {optuna.trial.TrialState.COMPLETE}


def test_two_workers_that_start_at_once_share_the_trials(url, file, study, tmp_path):
    workers = [start(url, file, tmp_path / "log") for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    check_each_once(url, study)
    begun = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(begun) == len({trial for trial, _ in begun}) == 24
    assert len({pid for _, pid in begun}) == 2


def test_killed_workers_lose_and_double_nothing(url, file, study, tmp_path):
    generator = random.Random(4)
    kills, log = 0, tmp_path / "log"
    log.touch()
    while True:
        workers = [start(url, file, log, 0.15) for _ in range(2)]
        if kills == 2:
            assert [worker.wait(60) for worker in workers] == [0, 0]
            break
        before = log.stat().st_size
        while log.stat().st_size == before:  # importing takes most of the time: kill behind it
            assert all(worker.poll() is None for worker in workers), "a worker ended by itself"
            time.sleep(0.02)
        time.sleep(generator.uniform(0.0, 0.8))
        for worker in workers:
            worker.kill()
            worker.wait()
        kills += 1
    check_each_once(url, study)
    begun = Counter(line.split()[0] for line in log.read_text().splitlines())
    assert len(begun) == 24
    assert 0 < sum(begun.values()) - 24 <= 2 * kills  # those that were under way were begun again


def open_store(url: str, study: Study) -> Store:
    store = Store(url, study.name)
    store.begin(study.shared_settings())
    return store


def test_claims_outcomes_and_retries(study, tmp_path):
    store = open_store(f"sqlite:///{tmp_path / 'study.db'}", study)
    trials = plan_trials(study, {}).trials[:2]
    by_name = {trial.name: trial for trial in trials}
    assert store.enter(trials) == 2
    assert store.enter(trials) == 0
    first = store.claim(by_name)
    assert store.claim(by_name) == first  # asked again, since the answer was lost
    assert store.owned_by(os.getpid()) == trials[0].name
    assert store.finish(first, Outcome("complete", 0.75, 0.5, 2.0))
    second = store.claim(by_name)
    assert [first.trial.name, second.trial.name] == [trial.name for trial in trials]
    assert store.finish(second, Outcome("failed", reason="no luck"))
    assert not store.finish(second, Outcome("complete", 1.0, 0.0))
    assert store.claim(by_name) is None
    outcomes = store.outcomes()
    assert outcomes[trials[0].name] == Outcome("complete", 0.75, 0.5, 2.0)
    assert (outcomes[trials[1].name].state, outcomes[trials[1].name].reason) == ("failed", "no luck")
    assert store.enter(trials, retry_failed=True) == 1
    assert store.outcomes()[trials[1].name].state == "waiting"


def test_a_trial_of_another_machine_is_taken_over_when_its_heart_stops(study, tmp_path, monkeypatch):
    store = open_store(f"sqlite:///{tmp_path / 'study.db'}", study)
    trials = plan_trials(study, {}).trials[:1]
    by_name = {trial.name: trial for trial in trials}
    store.enter(trials)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("gn_transfer.study.store._host", lambda: "elsewhere")
        theirs = store.claim(by_name)
    assert store.claim(by_name) is None
    store._storage.grace_period = 0
    time.sleep(2.1)  # SQLite's clock counts seconds
    ours = store.claim(by_name)
    assert ours is not None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("gn_transfer.study.store._host", lambda: "elsewhere")
        assert not store.finish(theirs, Outcome("complete", 0.1, 1.0))
    assert store.finish(ours, Outcome("complete", 0.2, 1.0))
    assert store.outcomes()[trials[0].name].value == 0.2


def test_changed_settings_are_refused(file, study, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store = open_store(url, study)
    store.enter(plan_trials(study, {}).trials)
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.01 and is 0\.5"):
        open_store(url, read_study(file)).begin({**study.shared_settings(), "optimizer.lr": 0.5})
    changed = read_study(file, overrides={"samples": 64})
    with pytest.raises(ConfigError, match="samples was None and is 64"):
        store.enter(plan_trials(changed, {}).trials)
    grown = read_study(file, overrides={"seeds": 3})
    assert store.enter(plan_trials(grown, {}).trials) == 12


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "is no database URL"),
        ("sqlite://", "in memory is lost"),
        ("postgresql://tester@127.0.0.1:1/none", "cannot be used"),
        ("mysql+mysqldb://127.0.0.1/none", "driver of this database is not installed"),
    ],
)
def test_databases_that_cannot_be_used(url, message):
    with pytest.raises(ConfigError, match=message):
        Store(url, "study")


def test_a_password_is_not_shown():
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError) as caught:
        Store("postgresql://tester:secret@127.0.0.1:1/none", "study")
    assert "secret" not in str(caught.value)


def test_files_that_are_no_database_of_ours(study, tmp_path):
    text = tmp_path / "notes.db"
    text.write_text("this is no database, but it is long enough to be looked at" * 20)
    with pytest.raises(ConfigError, match="file is not a database"):
        Store(f"sqlite:///{text}", "study")
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("create table songs (title text)")
    connection.close()
    with pytest.raises(ConfigError, match="holds tables of another program \\(songs\\)"):
        Store(f"sqlite:///{foreign}", "study")
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    optuna.create_study(storage=url, study_name=study.name)
    with pytest.raises(ConfigError, match="not gn-transfer's"):
        open_store(url, study)


@pytest.mark.parametrize("kind", ["view", "trigger", "table", "index"])
def test_a_database_that_computes_is_refused(study, tmp_path, kind):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    open_store(url, study).close()
    statement = {
        "view": "create view endless as with recursive n as (select 1 union all select 1 from n) select * from n",
        "trigger": "create trigger endless after insert on trials begin delete from studies; end",
        "table": "create table endless (a, b as (hex(zeroblob(100000000))))",
        "index": "create index endless on studies (hex(zeroblob(100000000)))",
    }[kind]
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(ConfigError, match=f"holds the {kind} 'endless', which computes something"):
        open_store(url, study)


@pytest.mark.parametrize(
    "statement",
    [
        "update trials set state = 'EVIL'",
        "update study_directions set direction = 'EVIL'",
        "update trial_user_attributes set value_json = 'no json'",
        "update trial_user_attributes set value_json = '[1]' where key = 'identity'",
        "update trial_user_attributes set value_json = '[1]' where key = 'trial'",
        "delete from trial_user_attributes where key = 'identity'",
        "update trials set state = 'COMPLETE'",
    ],
)
def test_rows_that_we_have_not_written(study, tmp_path, statement):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store = open_store(url, study)
    store.enter(plan_trials(study, {}).trials)
    store.close()
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(ConfigError, match=r"is corrupt|cannot be used"):
        open_store(url, study).outcomes()


@pytest.mark.parametrize("alive", [True, False])
def test_without_proc_a_process_is_asked_and_left_alone(monkeypatch, alive):
    class Nowhere:
        def __init__(self, path):
            self.path = path

        def read_text(self, **_):
            raise FileNotFoundError(self.path)

        def exists(self):
            return False

    def kill(pid, number):
        assert (pid, number) == (4321, 0)  # asks, and sends nothing
        if not alive:
            raise ProcessLookupError

    monkeypatch.setattr(store_module, "Path", Nowhere)
    monkeypatch.setattr(store_module.os, "kill", kill)
    assert store_module._started(4321) == ("unknown" if alive else None)
