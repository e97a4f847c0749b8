"""Families of timm's convolutional models under each norm: does a fit of 20 steps and an export work?

For every family and norm, the model is trained for 20 optimizer steps at batch size 1 on images of the embedded sample
at 64 px, and exported. It starts from random weights; under the BN norms and `gn_calibrated` from those of its BN twin,
whose statistics are those of the sample's images, as after a training. It works where the loss stays finite and the
logits of the bundle equal the checkpoint's to 1e-4 on the validation images (`gn-transfer export` refuses otherwise).

    python benchmarks/families.py --json > benchmarks/results/families.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

import gn_transfer as gnt
from gn_transfer.backbones.families import TESTED_FAMILIES
from gn_transfer.config import ConfigError
from gn_transfer.data.sample import write_sample
from gn_transfer.inference.export import export_bundle
from gn_transfer.training.environment import environment
from gn_transfer.training.run_folder import claim_run
from gn_transfer.training.train import create_trainer, prepare, train

NORMS = ("bn", "bn_frozen", "gn", "gn_calibrated", "gn_ws", "ln", "in")
STEPS = 20


def twin(family: str, folder: Path, images: torch.Tensor) -> Path:
    """Save a BN model whose running statistics are those of some images, as if it had been trained on them."""
    path = folder / f"{family}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        model = timm.create_model(family, num_classes=5).train()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the plain average
                if not layer.weight.any():  # timm starts some at zero
                    nn.init.constant_(layer.weight, 0.5)
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            model((images / 255 - mean) / std)
        save_file(model.state_dict(), path)
    return path


def try_one(family: str, norm: str, data: gnt.Sample, folder: Path, images: torch.Tensor) -> dict[str, Any]:
    """Train and export one model."""
    row: dict[str, Any] = {"family": family, "norm": norm, "works": False}
    calibrated = norm == "gn_calibrated"
    from_twin = calibrated or norm in ("bn", "bn_frozen")
    model = gnt.ModelConfig(
        family,
        "gn" if calibrated else norm,  # type: ignore[arg-type]
        pretrained=str(twin(family, folder, images)) if from_twin else None,
        conversion="calibrated" if calibrated else "error",
    )
    try:
        task = gnt.TransferClassifier(model, gnt.OptimizerConfig(lr=0.0001))
        trainer = create_trainer(
            max_steps=STEPS, limit_val_batches=1.0, figures=False, enable_progress_bar=False, log_every_n_steps=5
        )
        prepare(task, data)
        run = claim_run(folder, f"{family}-{norm}", task.norm, 1, 0)
        train(task, data, trainer, run, loggers=None)
        with tempfile.TemporaryDirectory() as bundle:
            parity = export_bundle(run.checkpoints / "best.ckpt", Path(bundle, "bundle"))
        row |= {"works": True, "max_difference": parity.max_difference, "tolerance": parity.tolerance}
    except (ConfigError, RuntimeError, ValueError) as error:
        row["why"] = " ".join(str(error).split())[:300]
    return row


def main() -> None:
    """Run all, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--families", nargs="+", default=list(TESTED_FAMILIES))
    parser.add_argument("--norms", nargs="+", default=list(NORMS), choices=NORMS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        write_sample(folder)
        sample = gnt.Sample(folder, img_size=96, num_workers=0, cache="none")
        sample.setup("fit")
        images = sample.training_images(32)
        for family in options.families:
            for norm in options.norms:
                data = gnt.Sample(
                    folder, img_size=64, batch_size=1, num_workers=0, shots_per_class=4, val_fraction=0.05, cache="none"
                )
                with contextlib.redirect_stdout(io.StringIO()):
                    rows.append(try_one(family, norm, data, folder, images))
                said = "works" if rows[-1]["works"] else f"fails: {rows[-1]['why']}"
                print(f"{family:<24} {norm:<14} {said}", file=sys.stderr)
    works = sum(row["works"] for row in rows)
    print(f"{works} of {len(rows)} work", file=sys.stderr)
    if options.json:
        print(json.dumps({"environment": environment(), "steps": STEPS, "works": works, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
