"""A killed run that is continued ends with the very weights of a run that was never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gn_transfer.__main__ import main

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
    calls = 0
    own = getattr(LastCheckpoint, hook)

    def crash_at(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == after:
            raise CrashError
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, hook, crash_at)
        with pytest.raises(CrashError):
            main(["fit", *arguments(folder_root, norm), *more])
    assert main(["fit", *arguments(folder_root, norm), *more, "--ckpt_path", "last"]) == 0
    assert_same(weights(whole, norm), weights(broken, norm))
    assert_same_records(whole, broken)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["gn_ws", "bn"])
def test_killed_at_random_moments(folder_root, tmp_path, norm):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gn_transfer", "fit", *arguments(folder_root, norm)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    subprocess.run(command, cwd=whole, env=environment, check=True, capture_output=True)
    kills = 0
    while kills < 5:
        found = list(broken.glob("checkpoints/default/*/last.ckpt"))
        process = subprocess.Popen(
            [*command, *(["--ckpt_path", "last"] if found else [])],
            cwd=broken,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = found[0].stat().st_mtime_ns if found else 0
        while process.poll() is None:  # let it get one checkpoint further, so that the run comes to an end
            now = [path.stat().st_mtime_ns for path in broken.glob("checkpoints/default/*/last.ckpt")]
            if now and now[0] != before:
                break
            time.sleep(0.01)
        time.sleep(random.random() * 0.5)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    print(f"{norm}: killed {kills} times")
    assert kills
    subprocess.run([*command, "--ckpt_path", "last"], cwd=broken, env=environment, check=True, capture_output=True)
    assert_same(weights(whole, norm), weights(broken, norm))
    assert_same_records(whole, broken)


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
