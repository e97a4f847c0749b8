"""A killed run that is continued ends with the very weights of a run that was never killed."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import kill_runs
import pytest
import torch

from gn_transfer.__main__ import main
from gn_transfer.training.checkpoint import read_checkpoint

OPTIONS = {
    "data.img_size": "64",
    "data.val_fraction": "0.3",
    "model.backbone": "resnet18",
    "accumulation.effective_batch_size": "4",
    "mixed_precision.mode": "fp32",
    "trainer.max_epochs": "3",
    "regularization.mixup": "0.3",
    "data.num_workers": "1",
    "checkpoint.every_minutes": "0",
}


def arguments(root: Path, norm: str) -> list[str]:
    options = [word for key, value in OPTIONS.items() for word in (f"--{key}", value)]
    return ["--data", "Folder", "--data.root", str(root), *options, "--model.norm", norm]


def weights(folder: Path, norm: str) -> dict[str, torch.Tensor]:
    [path] = folder.glob(f"checkpoints/default/{norm}-bs1-seed0*/last.ckpt")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [key for key, value in first.items() if not torch.equal(value, second[key])]
    assert not different


def assert_same_records(whole: Path, broken: Path) -> None:
    """Compare what the runs have written, without times and places; nothing half-written is left."""
    first, second = (next(iter(folder.glob("runs/default/*"))) for folder in (whole, broken))
    for name in ("epochs.csv", "predictions_val.csv", "predictions_best_val.csv"):
        assert (first / name).read_text() == (second / name).read_text(), name
    timed = {"images_per_sec", "peak_memory_mib", "wall_time_s"}
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (first, second))
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}
    assert not [path for path in broken.rglob(".*") if path.name.endswith((".part", ".old"))]


@pytest.fixture
def one_thread():
    """A sum split among other threads rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CrashError(Exception):
    """Stands for a crash."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("norm", "crash", "more"),
    [
        ("gn_ws", ("on_train_batch_end", 15), []),  # saved behind the first step of the second epoch
        pytest.param("bn", ("on_train_batch_end", 6), [], marks=pytest.mark.slow),
        pytest.param("bn", ("on_validation_end", 2), [], marks=pytest.mark.slow),
        ("bn", ("on_train_batch_end", 11), ["--trainer.max_steps", "8"]),  # the third epoch is not whole
    ],
)
def test_a_crashed_run_continues_exactly(folder_root, tmp_path, monkeypatch, norm, crash, more):
    hook, after = crash
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    monkeypatch.chdir(whole)
    assert main(["fit", *arguments(folder_root, norm), *more]) == 0

    from gn_transfer.training.checkpoint_callbacks import LastCheckpoint

    monkeypatch.chdir(broken)
    with crashing(monkeypatch, LastCheckpoint, hook, after), pytest.raises(CrashError):
        main(["fit", *arguments(folder_root, norm), *more])
    assert main(["fit", *arguments(folder_root, norm), *more, "--ckpt_path", "last"]) == 0
    assert_same(weights(whole, norm), weights(broken, norm))
    assert_same_records(whole, broken)


@contextmanager
def crashing(monkeypatch, kind, hook, after=1):
    """Crash at a call of a hook of a callback."""
    calls = 0
    own = getattr(kind, hook)

    def crash_at(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == after:
            raise CrashError
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, hook, crash_at)
        yield


def run_whole(root, monkeypatch, words):
    """Run a command to its end in one folder, and go to another one for the run that is broken."""
    for name in ("whole", "broken"):
        (root / name).mkdir()
    monkeypatch.chdir(root / "whole")
    assert main(words) == 0
    monkeypatch.chdir(root / "broken")


def epochs_and_status(folder):
    [run] = folder.glob("runs/default/*")
    rows = list(csv.DictReader((run / "epochs.csv").read_text().splitlines()))
    return [int(row["epoch"]) for row in rows], json.loads((run / "metrics.json").read_text())["status"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("more", [[], ["--ema.decay", "0.9"]], ids=["plain", "ema"])
def test_a_run_that_stopped_behind_its_last_step_comes_to_its_end(folder_root, tmp_path, monkeypatch, more):
    """Nothing is left to train, and Lightning calls no on_train_end."""
    from gn_transfer.training.record import RunRecord

    words = ["fit", *arguments(folder_root, "gn_ws"), *more]
    run_whole(tmp_path, monkeypatch, words)
    with crashing(monkeypatch, RunRecord, "on_train_end"), pytest.raises(CrashError):
        main(words)
    assert epochs_and_status(tmp_path / "broken") == ([1, 2, 3], "failed")
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert_same(weights(tmp_path / "whole", "gn_ws"), weights(tmp_path / "broken", "gn_ws"))
    assert_same_records(tmp_path / "whole", tmp_path / "broken")
    before = next(tmp_path.glob("broken/runs/default/*/metrics.json")).read_text()
    assert main([*words, "--ckpt_path", "last"]) == 0  # and stays as it is
    assert next(tmp_path.glob("broken/runs/default/*/metrics.json")).read_text() == before


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("crash", [None, "on_train_end"])
def test_a_run_stops_early_and_does_not_go_on_afterwards(folder_root, tmp_path, monkeypatch, crash):
    from gn_transfer.training.record import RunRecord

    monkeypatch.chdir(tmp_path)
    words = ["fit", *arguments(folder_root, "gn_ws"), "--optimizer.lr", "1e-12", "--trainer.max_epochs", "6"]
    words += ["--early_stopping.patience", "2"]
    if crash is None:
        assert main(words) == 0
    else:
        with crashing(monkeypatch, RunRecord, crash), pytest.raises(CrashError):
            main(words)
        assert main([*words, "--ckpt_path", "last"]) == 0
    assert epochs_and_status(tmp_path) == ([1, 2, 3], "finished")  # the first is the best


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("minutes", ["0", "60"])
def test_a_run_that_max_steps_stopped_inside_an_epoch_goes_on_in_it(folder_root, tmp_path, monkeypatch, minutes):
    schedule = ["--optimizer.schedule", "constant", "--optimizer.warmup_fraction", "0"]
    words = ["fit", *arguments(folder_root, "gn_ws"), *schedule, "--checkpoint.every_minutes", minutes]
    run_whole(tmp_path, monkeypatch, words)
    assert main([*words, "--trainer.max_steps", "4"]) == 0  # an epoch has three
    assert main([*words, "--trainer.max_steps", "-1", "--ckpt_path", "last"]) == 0
    assert_same(weights(tmp_path / "whole", "gn_ws"), weights(tmp_path / "broken", "gn_ws"))
    assert epochs_and_status(tmp_path / "broken") == epochs_and_status(tmp_path / "whole")


@contextmanager
def asked(monkeypatch, at, request):
    """Have something requested in front of a micro-batch, counted over all epochs from 0."""
    from gn_transfer.training.checkpoint_callbacks import LastCheckpoint

    calls = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        nonlocal calls
        if calls == at:
            request(self, trainer)
        calls += 1

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_start", on_train_batch_start)
        yield


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("at", [1, 5, 10, 14])  # inside the first and the second step of two epochs
def test_a_run_that_stops_inside_a_step_goes_on_before_it(folder_root, tmp_path, monkeypatch, at):
    """As Lightning's max_time stops it, which looks at the clock after every micro-batch."""
    words = ["fit", *arguments(folder_root, "gn_ws"), "--trainer.max_epochs", "2", "--checkpoint.every_minutes", "60"]
    run_whole(tmp_path, monkeypatch, words)
    with asked(monkeypatch, at, lambda callback, trainer: setattr(trainer, "should_stop", True)):
        assert main(words) == 0  # it is validated where it stops
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert_same(weights(tmp_path / "whole", "gn_ws"), weights(tmp_path / "broken", "gn_ws"))
    whole, broken = (
        next((tmp_path / name).glob("runs/default/*/epochs.csv")).read_text() for name in ("whole", "broken")
    )
    assert whole.splitlines()[-1] == broken.splitlines()[-1]


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_asked_to_stop_before_a_validation_stops_after_it(folder_root, tmp_path, monkeypatch):
    words = ["fit", *arguments(folder_root, "gn_ws"), "--accumulation.effective_batch_size", "1"]
    words += ["--trainer.val_check_interval", "4", "--trainer.max_epochs", "2", "--regularization.mixup", "0"]
    words += ["--checkpoint.every_minutes", "60"]
    run_whole(tmp_path, monkeypatch, words)
    with asked(monkeypatch, 3, lambda callback, trainer: setattr(callback, "stop_requested", True)):
        assert main(words) == 130
    assert epochs_and_status(tmp_path / "broken")[0] == [1]
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert_same(weights(tmp_path / "whole", "gn_ws"), weights(tmp_path / "broken", "gn_ws"))
    assert_same_records(tmp_path / "whole", tmp_path / "broken")


INSIDE_A_STEP = ["--trainer.val_check_interval", "3", "--accumulation.effective_batch_size", "2"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("more", [[], INSIDE_A_STEP], ids=["whole", "inside a step"])
def test_a_run_goes_on_from_the_best_of_another(folder_root, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    words = ["fit", *arguments(folder_root, "gn_ws"), "--checkpoint.every_minutes", "60", *more]
    assert main(words) == 0
    [folder] = Path().glob("checkpoints/default/*")
    shutil.copy(folder / "best.ckpt", "mine.ckpt")
    for checkpoint in (folder / "best.ckpt", Path("mine.ckpt")):
        assert main([*words, "--ckpt_path", str(checkpoint)]) == 0
    first, second, third = (Path("runs/default", f"{folder.name}{suffix}") for suffix in ("", "-2", "-3"))
    for other in (second, third):
        assert (other / "epochs.csv").read_text() == (first / "epochs.csv").read_text()
        assert (Path("checkpoints/default") / other.name / "best.ckpt").is_file() or other == third
    assert (Path("checkpoints/default") / second.name / "best.ckpt").read_bytes() == (folder / "best.ckpt").read_bytes()
    records = [json.loads((run / "metrics.json").read_text()) for run in (first, second)]
    assert records[0]["best/epoch"] == records[1]["best/epoch"]


@pytest.mark.usefixtures("one_thread")
def test_a_typed_length_counts_instead_of_the_samples_of_a_run(folder_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for word in arguments(folder_root, "gn_ws") if word not in ("--trainer.max_epochs", "3")]
    assert main(["fit", *words, "--samples", "4", "--checkpoint.every_minutes", "60"]) == 0
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    [record] = Path().glob("runs/default/*/metrics.json")
    assert json.loads(record.read_text())["samples_seen"] == 4 + 9


@pytest.mark.usefixtures("one_thread")
def test_no_checkpoint_stands_between_a_step_and_its_validation(folder_root, tmp_path, monkeypatch):
    from gn_transfer.training.checkpoint_callbacks import LastCheckpoint

    words = ["fit", *arguments(folder_root, "gn_ws"), "--accumulation.effective_batch_size", "1"]
    words += ["--trainer.val_check_interval", "4", "--trainer.max_epochs", "2", "--regularization.mixup", "0"]
    run_whole(tmp_path, monkeypatch, words)
    with crashing(monkeypatch, LastCheckpoint, "on_validation_start"), pytest.raises(CrashError):
        main(words)
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert_same(weights(tmp_path / "whole", "gn_ws"), weights(tmp_path / "broken", "gn_ws"))
    assert_same_records(tmp_path / "whole", tmp_path / "broken")


def test_a_place_behind_the_end_of_the_epochs_is_refused(folder_root, tmp_path, monkeypatch, capsys):
    from gn_transfer.training.checkpoint_callbacks import LastCheckpoint

    monkeypatch.chdir(tmp_path)
    words = ["fit", *arguments(folder_root, "gn_ws"), "--trainer.limit_train_batches", "4"]
    words += ["--accumulation.effective_batch_size", "2"]
    with crashing(monkeypatch, LastCheckpoint, "on_train_batch_end", 3), pytest.raises(CrashError):
        main([*words, "--data.batch_size", "2"])
    more = ["--data.batch_size", "1", "--trainer.limit_train_batches", "1", "--ckpt_path", "last"]
    assert main([*words, *more]) == 2
    assert "stands behind batch 4 of its epoch, and here an epoch has 1. trainer.limit" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_the_average_does_not_take_the_place_of_weights_that_were_not_written(folder_root, tmp_path, monkeypatch):
    """The disk is full at the end of the last epoch, and has room again at the end of the training."""
    from gn_transfer.training import checkpoint_callbacks

    words = ["fit", *arguments(folder_root, "gn_ws"), "--ema.decay", "0.9", "--checkpoint.every_minutes", "60"]
    run_whole(tmp_path, monkeypatch, words)
    own, calls = checkpoint_callbacks.write_checkpoint, []

    def full(content, path, **options):
        calls.append(path.name)
        if path.name == "last.ckpt" and calls.count("last.ckpt") == 3:
            raise OSError(28, "No space left on device", str(path))
        own(content, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_callbacks, "write_checkpoint", full)
        assert main(words) == 0
    assert calls.count("last.ckpt") == 4
    assert_same(weights(tmp_path / "whole", "gn_ws"), weights(tmp_path / "broken", "gn_ws"))
    one, two = (next(tmp_path.glob(f"{name}/checkpoints/default/*/last.ckpt")) for name in ("whole", "broken"))
    one, two = (torch.load(path, weights_only=True)["current_model_state"] for path in (one, two))
    assert_same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("case", kill_runs.CASES)
def test_killed_at_random_moments(case):
    assert kill_runs.main([case, "--kills", "3"]) == 0


@pytest.mark.usefixtures("one_thread")
def test_a_run_whose_last_checkpoint_is_corrupt_goes_on_with_the_one_before(folder_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, epochs in ((whole, "2"), (broken, "1")):
        folder.mkdir()
        monkeypatch.chdir(folder)
        schedule = ["--optimizer.schedule", "constant"]  # another number of epochs does not change the rates
        words = [*schedule, "--optimizer.warmup_fraction", "0", "--trainer.max_epochs", epochs]
        assert main(["fit", *arguments(folder_root, "gn_ws"), *words]) == 0
    [last] = broken.glob("checkpoints/default/*/last.ckpt")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert main(["validate", str(last)]) == 2  # what is evaluated is never exchanged
    capsys.readouterr()
    assert main(["fit", "--ckpt_path", str(last), "--trainer.max_epochs", "2"]) == 0
    assert "The run goes on with the checkpoint before it, previous.ckpt" in capsys.readouterr().out
    assert len(list(broken.glob("runs/default/*"))) == 1
    assert_same(weights(whole, "gn_ws"), weights(broken, "gn_ws"))
    assert {path.name for path in last.parent.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    read_checkpoint(last)
    read_checkpoint(last.with_name("previous.ckpt"))  # the corrupt file has not taken its place


def test_signals_of_two_kinds_at_the_same_time_are_one_request(monkeypatch):
    from types import SimpleNamespace

    from gn_transfer.training import checkpoint_callbacks

    callback = checkpoint_callbacks.LastCheckpoint()
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), world_size=1)
    callback.on_train_start(trainer, None)
    try:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert callback.stop_requested
        monkeypatch.setattr(checkpoint_callbacks, "SAME_REQUEST_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        callback.on_exception(trainer, None, KeyboardInterrupt())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_stops_and_a_second_one_stops_at_once(name):
    from types import SimpleNamespace

    from gn_transfer.training.checkpoint_callbacks import LastCheckpoint

    number = getattr(signal, name)
    before = signal.getsignal(number)
    callback, trainer = LastCheckpoint(), SimpleNamespace(state=SimpleNamespace(fn="fit"), world_size=1)
    callback.on_train_start(trainer, None)
    try:
        signal.raise_signal(number)
        assert callback.stop_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        callback.on_exception(trainer, None, KeyboardInterrupt())
    assert signal.getsignal(number) is before
