"""Two processes train the net that one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gn_transfer.training.checkpoint import read_checkpoint

OPTIONS = {
    "data": "Folder",
    "data.img_size": "64",
    "data.val_fraction": "0.5",
    "model.backbone": "resnet18",
    "model.norm": "gn_ws",
    "accumulation.effective_batch_size": "4",
    "mixed_precision.mode": "fp32",
    "trainer.max_epochs": "2",
    "trainer.accelerator": "cpu",
}


@pytest.mark.slow
def test_two_processes_with_accumulation_equal_one(folder_root, tmp_path):
    options = [word for key, value in OPTIONS.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "gn_transfer", "fit", *options, "--data.root", str(folder_root)]
    found = []
    for name, extra in (("one", []), ("two", ["--trainer.devices", "2", "--trainer.strategy", "ddp"])):
        folder: Path = tmp_path / name
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *extra], cwd=folder, env=environment, check=True, capture_output=True)
        [run] = (folder / "runs" / "default").iterdir()
        assert run.name == "gn_ws-bs1-seed0"
        found.append(read_checkpoint(folder / "checkpoints" / "default" / run.name / "last.ckpt")["state_dict"])
    one, two = found
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)
