"""What tiles do to a segmentation under each norm: the same model on whole images and on tiles of them.

GroupNorm, LayerNorm and InstanceNorm take their statistics from what they see, in evaluation as well. Of a tile they
see less than of the image, so that each tile has statistics of its own. BatchNorm evaluates with stored statistics,
the same for every tile. A model is trained for each norm, then evaluated on the validation images: whole, and in tiles.

    python benchmarks/tiles.py --data_root PATH --backbone resnetv2_18 --samples 480 --tiles 64 128 --json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gn_transfer import PetsSegmentation
from gn_transfer.__main__ import main as run_command
from gn_transfer.data.masks import IGNORED
from gn_transfer.inference.load import load
from gn_transfer.inference.parity import mean_iou
from gn_transfer.training.environment import environment
from gn_transfer.training.segmentation import TransferSegmenter

NORMS = ("bn_frozen", "gn_ws", "gn", "ln", "in")


def train(norm: str, seed: int, options: argparse.Namespace, folder: Path) -> TransferSegmenter:
    """Train a model at batch size 1 and give it back in evaluation mode."""
    words = ["fit", "--config", "pets_segmentation_gnws.yaml", "--data.root", str(options.data_root.resolve())]
    given = {
        "model.backbone": options.backbone,
        "model.norm": norm,
        "model.decoder": options.decoder,
        "data.img_size": str(options.img_size),
        "optimizer.lr": str(options.lr),
        "mixed_precision.mode": "fp32",
        "seed_everything": str(seed),
        "trainer.max_epochs": str(max(1, round(options.samples / 160))),
        "trainer.enable_progress_bar": "false",
    }
    if norm in ("gn", "ln", "in"):
        given["model.conversion"] = "calibrated"
    words += [word for key, value in given.items() for word in (f"--{key}", value)]
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run_command(words) == 0
        [checkpoint] = folder.glob(f"checkpoints/pets_segmentation_gnws/{norm}-bs1-seed{seed}*/last.ckpt")
        task = load(checkpoint)
    finally:
        os.chdir(before)
    assert isinstance(task, TransferSegmenter)
    return task


def evaluate(task: TransferSegmenter, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare whole images with tiles."""
    data = PetsSegmentation(options.data_root, img_size=options.img_size, seed=seed, val_fraction=0.2)
    data.setup("validate")
    number = len(task.classes)
    confusions = {tile: np.zeros((number, number), np.int64) for tile in (None, *options.tiles)}
    differing = dict.fromkeys(options.tiles, 0)
    shift = dict.fromkeys(options.tiles, 0.0)
    pixels = images = 0
    for batch, targets in data.val_dataloader():
        target = targets[0].numpy()
        labeled = target != IGNORED
        whole = None
        for tile in (None, *options.tiles):
            task.tile_size = tile
            with torch.inference_mode():
                probs = task(batch)[0].softmax(0).numpy()
            pred = probs.argmax(0)
            pairs = target[labeled].astype(np.int64) * number + pred[labeled]
            confusions[tile] += np.bincount(pairs, minlength=number**2).reshape(number, number)
            if whole is None:
                whole = probs
            else:
                differing[tile] += int((pred != whole.argmax(0)).sum())
                shift[tile] += float(np.abs(probs - whole).max(0).mean())
        pixels, images = pixels + target.size, images + 1
    rows = [{"tile": "whole", "miou": mean_iou(confusions[None]), "images": images}]
    return rows + [
        {
            "tile": tile,
            "miou": mean_iou(confusions[tile]),
            "images": images,
            "changed_pixels": differing[tile] / pixels,
            "mean_change_of_probability": shift[tile] / images,
        }
        for tile in options.tiles
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate every norm and seed."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for norm in options.norms:
                task = train(norm, seed, options, Path(folder))
                rows += [{"norm": norm, "seed": seed, **row} for row in evaluate(task, seed, options)]
                print(rows[-1 - len(options.tiles) :], flush=True)
    keys = ("backbone", "decoder", "img_size", "samples", "lr", "seeds")
    return {**{key: getattr(options, key) for key in keys}, "rows": rows, **environment()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--backbone", default="resnetv2_18")
    parser.add_argument("--decoder", default="unet")
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=480)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tiles", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--norms", nargs="+", default=list(NORMS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    result = measure(options)
    if options.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
