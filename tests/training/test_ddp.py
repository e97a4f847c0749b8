"""Two processes train the net that one process trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gn_transfer.training.checkpoint import read_checkpoint

OPTIONS = {
    "data.img_size": "64",
    "data.val_fraction": "0.25",  # of three images, two processes see four
    "model.backbone": "resnet18",
    "model.norm": "gn_ws",
    "accumulation.effective_batch_size": "4",
    "mixed_precision.mode": "fp32",
    "trainer.max_epochs": "1",  # later, what rounds otherwise has grown, as between one and two threads
    "trainer.accelerator": "cpu",
    "checkpoint.every_minutes": "0.001",  # each process has a clock of its own, and they must agree
}
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def write_pairs(root: Path) -> Path:
    """Twelve images with masks."""
    generator = np.random.default_rng(0)
    for number in range(12):
        mask = np.zeros((70, 80), np.uint8)
        mask[:, 20 + 3 * number :] = 1
        pixels = generator.integers(0, 90, (70, 80, 3), np.uint8) + 120 * mask[..., None]
        for kind, content in (("images", pixels), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(root / kind / f"{number}.png")
    (root / "classes.txt").write_text("left\nright\n")
    return root


def words(given: dict[str, str]) -> list[str]:
    return [word for key, value in given.items() for word in (f"--{key}", value)]


@pytest.mark.parametrize("task", ["classification", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_two_processes_with_accumulation_equal_one(folder_root, tmp_path, task):
    given = {**OPTIONS, "data": "Folder", "data.root": str(folder_root)}
    if task == "segmentation":
        pairs = write_pairs(tmp_path / "pairs")
        given |= {"data": "SegmentationFolder", "data.root": str(pairs), "model.decoder": "unet"}
    command = [sys.executable, "-m", "gn_transfer", "fit", *words(given)]
    found, metrics = [], []
    for name, batches, extra in (("one", "8", []), ("two", "4", TWO)):
        folder: Path = tmp_path / name
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        extra = [*extra, "--trainer.limit_train_batches", batches]
        subprocess.run([*command, *extra], cwd=folder, env=environment, check=True, capture_output=True, timeout=240)
        [run] = (folder / "runs" / "default").iterdir()
        assert run.name == "gn_ws-bs1-seed0"
        found.append(read_checkpoint(folder / "checkpoints" / "default" / run.name / "last.ckpt")["state_dict"])
        metrics.append(json.loads((run / "metrics.json").read_text()))
    one, two = found
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)
    figures = [{key: value for key, value in some.items() if key.startswith("val/")} for some in metrics]
    assert len(figures[0]) > 2
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)  # every image counts once
    assert metrics[1]["val_images"] == 3


@pytest.fixture
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(options, folder, environment):
    command = [sys.executable, "-m", "gn_transfer", "fit", *options, *TWO, "--trainer.max_epochs", "9999"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/*/*/previous.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other(folder_root, tmp_path, environment):
    options = words({**OPTIONS, "data": "Folder", "data.root": str(folder_root)})
    process = start(options, tmp_path, environment)
    [child] = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(child), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "another process of this training has ended" in error


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_the_number_of_devices_is_kept(folder_root, tmp_path, environment):
    options = words({**OPTIONS, "data": "Folder", "data.root": str(folder_root), "checkpoint.every_minutes": "9"})
    process = start([*options, "--data.val_fraction", "0.2"], tmp_path, environment)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with: gn-transfer fit" in output
    [last] = tmp_path.glob("checkpoints/*/*/last.ckpt")
    content = torch.load(last, weights_only=True)
    content["gn_transfer"]["position"]["batch"] = 2
    torch.save(content, last)
    alone = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    command = [sys.executable, "-m", "gn_transfer", "fit", "--ckpt_path", str(last), *alone]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "inside an epoch on 2 devices, and here are 1; continue with --trainer.devices 2" in done.stderr
