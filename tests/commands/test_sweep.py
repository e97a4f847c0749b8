"""The command sweep through the real command line, on small images."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from rich.console import Console

from gn_transfer.__main__ import main
from gn_transfer.commands import sweep
from gn_transfer.study.definition import read_study
from gn_transfer.study.planning import Choice, Outcome, Planned, plan_trials
from gn_transfer.study.runner import StudyProgress, StudyRunner, describe_plan
from gn_transfer.study.trials import Trial
from gn_transfer.study.worker import StudyContext, run_trial, run_trials
from gn_transfer.training.checkpoint import read_checkpoint

SMALL = """
base: pets_gnws.yaml
samples: 24
set: {{data.root: {root}, data.img_size: 32, model.backbone: resnetv2_18, model.pretrained: null, optimizer.lr: 0.01,
  mixed_precision.mode: fp32, accumulation.effective_batch_size: 4, data.batch_size: 4}}
"""


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def reported(monkeypatch) -> list[list[str]]:
    """The runs that the report was asked for."""
    asked: list[list[str]] = []
    write = sweep.write_report

    def write_report(runs, output, baseline, title, notes):
        asked.append([run.name for run in runs])
        return write(runs, output, baseline, title, notes)

    monkeypatch.setattr(sweep, "write_report", write_report)
    return asked


def study_file(root: Path, rest: str) -> Path:
    path = Path("sweep_small.yaml")
    path.write_text(SMALL.format(root=root) + rest)
    return path


def metrics(trial: str) -> dict:
    return json.loads(Path("runs/sweep_small", trial, "metrics.json").read_text())


def test_a_study_from_choice_to_test(pets_root, reported, capsys):
    rest = """
grid: {model.norm: [gn_ws]}
select: {values: [0.001, 0.01, 0.1], seeds: 1, extend: 0}
test: last
"""
    path = study_file(pets_root, rest)
    path.write_text(path.read_text().replace("optimizer.lr: 0.01,", ""))
    assert main(["sweep", "--config", str(path), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "plan       3 trials and 2 to come (3 select); 1 worker with " in printed
    assert "chosen" in printed
    assert "5/5" in printed
    assert "gn_ws" in printed.partition("5/5")[2]
    assert "</html>" in Path("runs/sweep_small/report/index.html").read_text()
    [finals] = reported
    assert [name.split("-lr")[0] for name in finals] == ["gn_ws"]
    for name in finals:
        found = metrics(name)
        assert (found["status"], found["samples_seen"], found["stage"]) == ("finished", 24, "final")
        assert found["test/checkpoint"] == "last.ckpt"
        assert found["weight_norm"] > 0
    chosen = [json.loads(path.read_text()) for path in Path("runs/sweep_small").glob("select-*/metrics.json")]
    assert len(chosen) == 3
    assert not any("test/acc1" in one for one in chosen)
    assert not list(Path("checkpoints").rglob("*.ckpt"))

    assert main(["compare", "runs/sweep_small", "--output", "again"]) == 0  # by hand, with what the study says
    assert "chosen by mean val/acc1" in Path("again/index.html").read_text()
    capsys.readouterr()
    assert main(["sweep", "--config", str(path), "--dry_run"]) == 0
    assert "5 have ended already" in " ".join(capsys.readouterr().out.split())

    stamps = {path: path.stat().st_mtime for path in Path("runs").rglob("metrics.json")}
    assert main(["sweep", "--config", str(path)]) == 0  # nothing is left to do but the report
    assert {path: path.stat().st_mtime for path in Path("runs").rglob("metrics.json")} == stamps

    capsys.readouterr()
    [final] = finals
    shutil.rmtree(Path("runs/sweep_small", final))
    assert main(["sweep", "--config", str(path)]) == 3  # a run that has ended is gone, and that is said
    assert f"left out   runs/sweep_small/{final}: its folder is not on this machine" in capsys.readouterr().out


def test_without_a_terminal_a_line_says_what_is_running(pets_root, monkeypatch, capsys):
    monkeypatch.setattr("gn_transfer.study.runner.SILENCE_SECONDS", 0.0)
    path = study_file(pets_root, "grid: {model.norm: [gn_ws]}\nseeds: [0]\n")
    assert main(["sweep", "--config", str(path)]) == 0
    assert re.search(r"running  \S*gn_ws-seed0 \(\d+ s\); 0/1 done", capsys.readouterr().out)


def test_on_a_terminal_the_running_trials_stand_below_the_bar():
    progress = StudyProgress()
    progress.running = "gn_ws-seed0 (12 s)"
    console = Console(file=io.StringIO(), width=80)
    console.print(progress.get_renderable())
    assert console.file.getvalue().rstrip().endswith("running  gn_ws-seed0 (12 s)")
    progress.running = "gn_ws-seed0 (12 s), " * 20  # on one line, however long
    console.print(progress.get_renderable())
    assert console.file.getvalue().rstrip().endswith("…")


@pytest.mark.parametrize(
    ("workers", "threads", "said"), [(1, 1, "1 worker with 1 thread "), (2, 3, "2 workers with 3 threads ")]
)
def test_workers_and_threads_are_counted(workers, threads, said):
    assert f"; {said}each" in describe_plan(Planned(), workers, threads)


def test_failed_trials_are_told_and_the_rest_goes_on(pets_root, reported, capsys):
    rest = "cases: {bn at 1: {model.norm: bn, data.batch_size: 1}, gn: {model.norm: gn_ws}}\nbaseline: {norm: bn}"
    path = study_file(pets_root, rest)
    assert main(["sweep", "--config", str(path)]) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "failed bn_at_1-seed0: data.img_size=32 with data.batch_size=1 cannot be trained" in printed
    assert reported[0] == ["gn-seed0"]
    assert "note: No contrasts: --baseline norm=bn" in printed
    assert Path("runs/sweep_small/report/index.html").is_file()


def test_failed_trials_are_run_again_wherever_in_the_study_they_stand(pets_root, monkeypatch, capsys):
    """Without workers: each trial ends as it is told to."""
    failing = {"gn_ws-lr0.02-seed1", "test-gn_ws-lr0.02-seed0"}
    ran: list[str] = []

    def work(runner, open_trials):
        store, stop = runner.store, threading.Event()

        def run(trial: Trial) -> Outcome:
            ran.append(trial.name)
            if sum(not outcome.ended for outcome in store.outcomes().values()) == 1:
                stop.set()
            fails = trial.name in failing
            return Outcome("failed" if fails else "complete", float("lr0.02" in trial.name), 1.0, 0.0, "no room")

        run_trials(store, runner.context.study, run, stop)

    monkeypatch.setattr(StudyRunner, "_keep_workers", work)
    rest = "grid: {model.norm: [gn_ws]}\nselect: {values: [0.01, 0.02, 0.04], seeds: 1}\nseeds: 2\ntest: last"
    path = study_file(pets_root, rest)
    path.write_text(path.read_text().replace("optimizer.lr: 0.01,", ""))
    assert main(["sweep", "--config", str(path)]) == 3
    printed = capsys.readouterr().out
    assert "failed     gn_ws-lr0.02-seed1: no room" in printed
    # Many trials end between two looks at the study: each has its line.
    lines = re.findall(r"^(\d+)/\d+  (\S+)", printed, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(ran) + 1))
    assert {name for _, name in lines} == set(ran)
    ran.clear()
    failing.clear()
    assert main(["sweep", "--config", str(path), "--retry_failed"]) == 3  # these runs left no folders to report on
    printed = capsys.readouterr().out
    assert "failed  " not in printed
    again = re.findall(r"^\d+/\d+  (\S+)", printed, re.MULTILINE)
    assert again == ran
    assert sorted(ran) == ["gn_ws-lr0.02-seed1", "test-gn_ws-lr0.02-seed0", "test-gn_ws-lr0.02-seed1"]


def test_dry_run_prints_trials_and_time_and_leaves_nothing(pets_root, capsys):
    path = study_file(pets_root, "grid: {model.norm: [gn, gn_ws]}\nseeds: 2")
    assert main(["sweep", "--config", str(path), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "gn_ws" in printed
    assert "4 trials (4 final); about" in printed
    assert "batch    batch 4 = effective batch 4" in printed
    assert "steps    1 epochs x 6 optimizer steps = 6" in printed
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("rest", "words", "message"),
    [
        ("grid: {model.nrom: [bn]}", [], "model.nrom is not a key; did you mean 'model.norm'"),
        (
            "grid: {model.norm: [bn]}",
            ["--optimizer.lrr", "1"],
            "optimizer.lrr is not a key; did you mean 'optimizer.lr'",
        ),
        (
            "grid: {model.norm: [bn, gn_ws]}\nbaseline: {norm: bn_forzen}",
            [],
            "baseline norm=bn_forzen: no trial has it; allowed: bn, gn_ws",
        ),
        ("grid: {model.norm: [bn, gnws]}", [], "trial gnws-seed0: model.norm=gnws is not allowed"),
        ("grid: {model.norm: []}", [], "is empty"),
        ("grid: {seed_everything: [1]}", [], "use seeds of the study"),
        ("grid: {model.norm: [gn], batch_norm.evaluation: [batch]}", [], "takes no statistics from a batch"),
        ("grid: {model.norm: [bn]}", ["--storage", "postgresql://nobody@127.0.0.1:1/none"], "cannot be used"),
        ("grid: {model.norm: [bn]}", ["--workers", "0"], "--workers 0: use 1 to"),
        ("grid: {model.norm: [bn]}", ["stray"], "belongs to no option"),
        ("grid: {model.norm: [bn]}", ["--seeds", "[0, 1"], "--seeds [0, 1 is not a value that YAML can read"),
        ("grid: {model.norm: [bn, gn]}\nbaseline: {nrom: bn}", [], "baseline nrom is not a key; did you mean 'norm'"),
        (
            "grid: {model.norm: [gn]}",
            ["--model.pretrained", "auto"],
            "model.pretrained=auto: no weights are known",
        ),
    ],
)
def test_bad_input_is_one_message(pets_root, capsys, rest, words, message):
    assert main(["sweep", "--config", str(study_file(pets_root, rest)), *words]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list(Path().glob("runs/*/*/"))


def test_runs_that_the_database_does_not_know_are_left_alone(pets_root, capsys):
    folder = Path("runs/sweep_small/bn-seed0")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    assert main(["sweep", "--config", str(study_file(pets_root, "grid: {model.norm: [bn]}"))]) == 2
    assert "knows nothing of it" in capsys.readouterr().err


def test_checkpoints_that_the_database_does_not_know_are_left_alone(pets_root, capsys):
    best = Path("checkpoints/sweep_small/bn-seed0/best.ckpt")
    best.parent.mkdir(parents=True)
    best.write_bytes(b"of a run of fit")
    assert main(["sweep", "--config", str(study_file(pets_root, "grid: {model.norm: [bn]}"))]) == 2
    assert "bn-seed0 is of a run, and the database" in capsys.readouterr().err
    assert best.read_bytes() == b"of a run of fit"


@pytest.mark.parametrize("name", ["", "study.db", "study.db.lock", "report", "report/figures", "study.json"])
def test_a_study_writes_through_no_link_of_its_folder(pets_root, capsys, name):
    outside, place = Path("outside").resolve(), Path("runs/sweep_small", name)
    outside.mkdir()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)
    assert main(["sweep", "--config", str(study_file(pets_root, "grid: {model.norm: [bn]}"))]) == 2
    assert "is a link to" in capsys.readouterr().err
    assert not list(outside.iterdir())


def context_and_trial(root: Path, rest: str) -> tuple[StudyContext, Trial]:
    study = read_study(study_file(root, rest))
    return StudyContext(study, Path(), sweep.train_trial, sweep.test_trial), plan_trials(study, {}).trials[0]


def test_a_begun_trial_goes_on_from_its_checkpoint(pets_root, monkeypatch):
    context, trial = context_and_trial(
        pets_root, "grid: {model.norm: [gn_ws], checkpoint.every_minutes: [0]}\nkeep: last"
    )

    def stop(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as broken:
        broken.setattr("gn_transfer.training.record.RunRecord.on_validation_end", stop)
        assert run_trial(context, trial) == Outcome(
            "failed", seconds=pytest.approx(0, abs=60), reason="RuntimeError: killed"
        )
    checkpoint = Path("checkpoints/sweep_small", trial.name, "last.ckpt")
    began = checkpoint.stat().st_mtime
    outcome = run_trial(context, trial)
    assert outcome.state == "complete"
    assert "continuing" in Path("runs/sweep_small", trial.name, "run.log").read_text()
    assert metrics(trial.name)["samples_seen"] == 24
    assert checkpoint.stat().st_mtime > began
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]  # what it replaced goes as well
    assert read_checkpoint(checkpoint)["optimizer_states"] == []


def test_a_trial_with_a_corrupt_checkpoint_starts_again(pets_root, capsys):
    context, trial = context_and_trial(pets_root, "grid: {model.norm: [gn_ws]}")
    checkpoint = Path("checkpoints/sweep_small", trial.name, "last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"half of a checkpo")
    assert run_trial(context, trial).state == "complete"
    assert "the checkpoints are corrupt, so this trial starts again" in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["another version", "no access"])
def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(pets_root, monkeypatch, reason):
    context, trial = context_and_trial(pets_root, "grid: {model.norm: [gn_ws]}")
    checkpoint = Path("checkpoints/sweep_small", trial.name, "last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    torch.save({"gn_transfer": {"version": 999}}, checkpoint)
    log = Path("runs/sweep_small", trial.name, "run.log")
    log.parent.mkdir(parents=True)
    log.write_text("hours of work")
    if reason == "no access":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("gn_transfer.training.checkpoint.zipfile.ZipFile", refuse)
    outcome = run_trial(context, trial)
    assert outcome.state == "failed"
    assert ("cannot be read now: Permission denied" if reason == "no access" else "format 999") in outcome.reason
    assert checkpoint.is_file()
    assert log.read_text() == "hours of work"


def test_a_test_without_checkpoint_says_why(pets_root):
    context, trial = context_and_trial(pets_root, "grid: {model.norm: [gn_ws]}\ntest: last")
    outcome = run_trial(context, replace(trial, stage="test", name=f"test-{trial.name}"))
    assert outcome.state == "failed"
    assert "last.ckpt is not there: when its run ended, the study did not say that it would be tested" in outcome.reason


@pytest.mark.parametrize("link", ["checkpoints/sweep_small/TRIAL", "checkpoints/sweep_small", "runs/sweep_small/TRIAL"])
def test_a_study_removes_nothing_behind_a_link(pets_root, link):
    """A study's folder from elsewhere says that a trial has ended, and its checkpoints lie behind a link."""
    context, trial = context_and_trial(pets_root, "grid: {model.norm: [gn_ws]}")
    outside = Path("outside")
    (outside / trial.name).mkdir(parents=True)
    files = [outside / "mine.ckpt", outside / trial.name / "mine.ckpt"]
    for file in files:
        file.write_bytes(b"mine")
    place = Path(link.replace("TRIAL", trial.name))
    place.parent.mkdir(parents=True)
    place.symlink_to(outside.resolve())
    if not link.startswith("runs"):
        logs = Path("runs/sweep_small", trial.name)
        logs.mkdir(parents=True)
        (logs / "metrics.json").write_text('{"status": "finished", "val/acc1": 0.5, "val/loss": 1.0}')
    outcome = run_trial(context, trial)
    assert outcome.state == "failed"
    assert "is a link to" in outcome.reason
    assert all(file.read_bytes() == b"mine" for file in files)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("optimizer.lr", ["test-gn-lr1e-05-seed0", "test-gn-lr0.0001-seed0", "test-gn-lr3-seed0"]),
        ("data.batch_size", ["test-gn-bs4-seed0", "test-gn-bs16-seed0"]),
    ],
)
def test_names_without_what_was_chosen(key, names):
    planned = Planned(choices=[Choice("gn", key, 1.0, "acc1", {}, False)])
    assert {sweep._without_choices(name, planned) for name in names} == {"test-gn-seed0"}
    assert sweep._without_choices("test-gn-lrfoo-seed0", planned) == "test-gn-lrfoo-seed0"
    assert sweep._without_choices(names[0], Planned()) == names[0]


def test_memory_is_stable_from_trial_to_trial(pets_root):
    context, _ = context_and_trial(pets_root, "grid: {model.norm: [gn_ws]}\nseeds: 4")

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    sizes = []
    for trial in plan_trials(context.study, {}).trials:
        assert run_trial(context, trial).state == "complete"
        sizes.append(resident_mib())
    # Weights, gradients and momentum take 130: kept by every trial, they would show in all later ones. The heap of a
    # process that ran other tests before moves by some 60.
    assert min(sizes[2:]) - sizes[1] < 100


def test_asked_to_end_it_says_how_to_go_on(pets_root):
    path = study_file(pets_root, "seeds: 40\ngrid: {model.norm: [bn]}")
    words = [sys.executable, "-u", "-m", "gn_transfer", "sweep", "--config", str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        try:
            assert command.stdout.readline().startswith("plan")
            assert command.stdout.readline().startswith("1/40")
            command.terminate()
            said, _ = command.communicate(timeout=120)
        except BaseException:
            command.kill()
            raise
    assert command.returncode == 130
    assert "the same command continues the study" in said


@pytest.mark.slow
def test_ten_kills_of_a_study_of_24_trials(url):
    path = Path("sweep_killed.yaml")
    path.write_text("""
base: digits.yaml
samples: 512
grid: {model.norm: [none, bn, gn], data.batch_size: [4, 8]}
seeds: 4
""")
    words = [sys.executable, "-m", "gn_transfer", "sweep", "--config", str(path), "--workers", "2", "--storage", url]
    generator = random.Random(7)
    for _ in range(10):
        with Path("out.log").open("a") as log:
            command = subprocess.Popen(words, stdout=log, stderr=log)
        time.sleep(generator.uniform(4.0, 20.0))
        command.send_signal(signal.SIGKILL)
        command.wait()
        time.sleep(0.3)
    assert subprocess.run(words, capture_output=True).returncode == 0
    storage = optuna.storages.RDBStorage(url.replace("postgresql:", "postgresql+psycopg:"))
    trials = optuna.load_study(storage=storage, study_name="sweep_killed").trials
    storage.engine.dispose()
    assert Counter(trial.state.name for trial in trials) == {"COMPLETE": 24}
    assert len({trial.user_attrs["trial"] for trial in trials}) == 24
    records = [json.loads(path.read_text()) for path in Path("runs/sweep_killed").glob("*/metrics.json")]
    assert [(record["status"], record["samples_seen"]) for record in records] == [("finished", 512)] * 24
