"""A run of the command line and its bundle, for the tests of what becomes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_transfer.__main__ import main


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory) -> Path:
    """What a run of one optimizer step over 30 images of noise leaves."""
    root = tmp_path_factory.mktemp("run")
    draw = np.random.default_rng(0)
    for number in range(30):
        folder = root / "images" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    words = "--model.backbone resnetv2_18 --model.norm gn_ws --model.pretrained null --data.img_size 64"
    words += " --data.batch_size 4 --accumulation.effective_batch_size 4 --mixed_precision.mode fp32"
    words += " --trainer.max_epochs 1 --trainer.limit_train_batches 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(["fit", "--config", "folder.yaml", "--data.root", "images", *words.split()]) == 0
    return root


@pytest.fixture(scope="session")
def bundle(exported_run: Path) -> Path:
    """The bundle of that run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(exported_run)
        assert main(["export", "checkpoints/folder/gn_ws-bs4-seed0/best.ckpt", "--output", "bundle"]) == 0
    return exported_run / "bundle"
