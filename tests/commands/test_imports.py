"""No command waits for the import of a library that it does not use."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from gn_transfer.__main__ import main

assert main(sys.argv[1:]) == 0
loaded = {name for name in sys.modules if not name.startswith("_")}
sys.stderr.write("loaded: " + " ".join(loaded))
"""
EXPORT = {"onnx", "onnxscript", "onnxruntime"}
STUDIES = {"optuna", "sqlalchemy"}
SCORES = {"sklearn"}  # which brings pandas along, where that is installed
TORCH = {"torch", "lightning", "timm", "torchmetrics", "albumentations", "segmentation_models_pytorch"}
CHECKPOINT = "checkpoints/folder/gn_ws-bs4-seed0/best.ckpt"
DATA = ["--data", "Folder", "--data.root", "images"]

COMMANDS = [
    (["--help"], TORCH | EXPORT | STUDIES | SCORES | {"numpy", "yaml", "rich", "PIL"}),
    (["fit", "--help"], TORCH | EXPORT | STUDIES | SCORES | {"numpy", "yaml", "rich", "PIL"}),
    (["compare", "--help"], TORCH | EXPORT | STUDIES | SCORES | {"numpy", "yaml", "rich", "PIL"}),
    (["predict", "bundle", "images/class 0/0.png"], TORCH | STUDIES | SCORES | {"onnx", "scipy", "matplotlib", "yaml"}),
    (["report", "runs/folder", "--output", "page.html"], TORCH | EXPORT | STUDIES),
    (["compare", "runs/folder", "--output", "comparison"], TORCH | EXPORT),
    (["fit", "--ckpt_path", "last", "--dry_run"], EXPORT | STUDIES | SCORES),
    (["validate", CHECKPOINT], EXPORT | STUDIES | SCORES),
    (["data", "check", *DATA], EXPORT | STUDIES | SCORES),
    (["export", CHECKPOINT, "--output", "other"], {"tensorboard"} | STUDIES | SCORES),
    (["doctor", CHECKPOINT, "--batch_size", "4"], EXPORT | STUDIES | SCORES),
    (["backbones"], EXPORT | STUDIES | SCORES | {"lightning", "torchmetrics", "albumentations", "scipy", "matplotlib"}),
]


@pytest.mark.parametrize(("words", "unused"), COMMANDS, ids=[" ".join(words[:2]) for words, _ in COMMANDS])
def test_what_a_command_leaves_out(exported_run, bundle, words, unused):
    command = [sys.executable, "-c", CODE, *words]
    done = subprocess.run(command, cwd=exported_run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.rpartition("loaded: ")[2].split())
    assert "gn_transfer" in loaded
    assert not unused & loaded
