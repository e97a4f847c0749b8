"""Two processes train the net that one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gn_transfer.training.checkpoint import read_checkpoint

OPTIONS = {
    "data.img_size": "64",
    "data.val_fraction": "0.5",
    "model.backbone": "resnet18",
    "model.norm": "gn_ws",
    "accumulation.effective_batch_size": "4",
    "mixed_precision.mode": "fp32",
    "trainer.max_epochs": "1",  # later, what rounds otherwise has grown, as between one and two threads
    "trainer.accelerator": "cpu",
}


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


@pytest.mark.parametrize("task", ["classification", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_two_processes_with_accumulation_equal_one(folder_root, tmp_path, task):
    given = {**OPTIONS, "data": "Folder", "data.root": str(folder_root)}
    if task == "segmentation":
        pairs = write_pairs(tmp_path / "pairs")
        given |= {"data": "SegmentationFolder", "data.root": str(pairs), "model.decoder": "unet"}
    options = [word for key, value in given.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "gn_transfer", "fit", *options]
    found = []
    for name, extra in (("one", []), ("two", ["--trainer.devices", "2", "--trainer.strategy", "ddp"])):
        folder: Path = tmp_path / name
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *extra], cwd=folder, env=environment, check=True, capture_output=True, timeout=240)
        [run] = (folder / "runs" / "default").iterdir()
        assert run.name == "gn_ws-bs1-seed0"
        found.append(read_checkpoint(folder / "checkpoints" / "default" / run.name / "last.ckpt")["state_dict"])
    one, two = found
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)
