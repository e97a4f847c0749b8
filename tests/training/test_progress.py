"""What a run says: one bar, a line where it would be silent for long, whole-epoch figures after a resumption."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rich
import torch
from PIL import Image
from rich.console import Console

from gn_transfer.__main__ import main
from gn_transfer.training.progress import EpochLines, RunProgressBar, Throughput

RUN = ["photos", "--model.backbone", "cnn_mnist", "--data.img_size", "28", "--model.pretrained", "null"]
RUN += ["--data.cache", "none", "--model.norm", "gn", "--model.num_groups", "4", "--mixed_precision.mode", "fp32"]


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(generator.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(f"photos/{name}/{number}.png")


def test_a_long_epoch_is_not_silent(capsys, monkeypatch):
    init = EpochLines.__init__
    monkeypatch.setattr(EpochLines, "__init__", lambda self, say=print, every_seconds=0.0: init(self, say, 0.0))
    assert main(["fit", *RUN, "--trainer.max_epochs", "2"]) == 0
    output = capsys.readouterr().out
    line = re.search(
        r"^epoch 2/2  batch 5/26  loss \S+  \S+ images/s  best 0\.\d+  about \d+ s of training left$", output, re.M
    )
    assert line is not None
    assert re.search(r"^epoch 1/2  loss \S+  val/acc1", output, re.M)


def test_one_bar_for_the_run(capsys, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(rich, "_console", terminal)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    totals = []
    start = RunProgressBar.on_train_start

    def watched(self, trainer, pl_module):
        start(self, trainer, pl_module)
        totals.append(self._bars.tasks[0].total)
        self.kept = self._bars

    monkeypatch.setattr(RunProgressBar, "on_train_start", watched)
    from lightning.pytorch import Trainer

    from gn_transfer.training import train

    created = []
    create = train.create_trainer

    def interactive(**arguments):
        trainer: Trainer = create(**{**arguments, "interactive": True})
        created.append(trainer)
        return trainer

    monkeypatch.setattr("gn_transfer.commands.training_cli.create_trainer", interactive)
    assert main(["fit", *RUN, "--trainer.max_epochs", "3"]) == 0
    assert totals == [3 * 26]
    bar = next(callback for callback in created[0].callbacks if isinstance(callback, RunProgressBar))
    assert bar.kept.tasks[0].completed == 3 * 26
    assert [task.description for task in bar.kept.tasks] == ["epoch 3/3"]  # that of the validation is gone
    shown = terminal.file.getvalue()
    assert "validation" in shown
    assert "images/s" in shown


def trainer_of(batches, step, every):
    return SimpleNamespace(
        world_size=1,
        num_training_batches=batches,
        accumulate_grad_batches=1,
        global_step=step,
        log_every_n_steps=every,
        loggers=[],
        current_epoch=0,
        optimizers=[SimpleNamespace(param_groups=[{"name": "all", "lr": 0.1}])],
    )


def test_a_validation_inside_an_epoch_takes_no_time_of_the_training(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    trainer = trainer_of(batches=40, step=0, every=10)
    throughput, module = Throughput(), SimpleNamespace(device=torch.device("cpu"))
    throughput.on_train_start(trainer, module)
    for index in range(40):  # an image a second
        clock[0] += 1.0
        trainer.global_step = index + 1
        throughput.on_train_batch_end(trainer, module, {"mean_loss": torch.tensor(1.0)}, (None, [0]), index)
        if index % 15 == 14:
            throughput.on_validation_start(trainer, module)
            clock[0] += 100.0
            throughput.on_validation_end(trainer, module)
    assert throughput.images_per_sec == pytest.approx(1.0)


def test_the_loss_of_an_epoch_is_the_mean_over_its_images_even_after_a_resumption():
    losses = [torch.tensor(value) for value in (1.0, 2.0, 3.0, 6.0)]
    trainer = trainer_of(batches=4, step=1, every=100)
    module = SimpleNamespace(device=torch.device("cpu"))

    def batches(callback, some):
        for index in some:
            callback.on_train_batch_end(trainer, module, {"mean_loss": losses[index]}, (None, [0, 1]), index)

    whole = Throughput()
    whole.on_train_start(trainer, module)
    batches(whole, range(4))
    assert whole.epoch_loss == pytest.approx(3.0)
    first, second = Throughput(), Throughput()
    first.on_train_start(trainer, module)
    batches(first, range(2))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.on_train_start(trainer, module)
    batches(second, range(2, 4))
    assert second.epoch_loss == pytest.approx(3.0)
    batches(second, range(1))
    assert second.epoch_loss != pytest.approx(3.0)


def test_the_memory_estimate_is_near_the_peak(tmp_path):
    """In a process of its own: the peak of this one is that of other tests."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "gn_transfer", "fit", "photos", "--model.backbone", "resnet18", "--data.img_size", "96",
         "--model.pretrained", "null", "--trainer.max_epochs", "1", "--data.cache", "none"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    estimate = float(re.search(r"about ([\d,]+) MiB at the peak", done.stdout)[1].replace(",", ""))
    [metrics] = Path("runs").glob("*/*/metrics.json")
    assert estimate == pytest.approx(json.loads(metrics.read_text())["peak_memory_mib"], rel=0.25)


def test_the_first_line_comes_before_the_imports(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["fit", "nowhere"]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"gn-transfer \S+ fit: loading", first)
