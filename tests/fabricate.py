"""Run folders as ``fit`` and ``test`` leave them, without training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

RIGHT, WRONG = (0.8, 0.8), (0.1, 0.7)  # probabilities of the target and of the predicted class
CLASSES = ["beagle", "pug", "Ragdoll", "Sphynx"]


def fabricate(
    root: Path,
    norm: str = "gn_ws",
    batch_size: int | str = 1,
    seed: int = 0,
    accuracy: float = 0.6,
    *,
    effective_batch_size: int = 8,
    images: int = 40,
    tested: bool = True,
    predictions: bool = True,
    data_root: str = "",
    config: dict[str, Any] | None = None,
    **metrics: Any,
) -> Path:
    """Write a finished run.

    Args:
        root: Where the folder goes.
        norm: The norm.
        batch_size: Images per forward.
        seed: The seed.
        accuracy: Share of right predictions, for every metric.
        effective_batch_size: Images per step.
        images: Images of validation and of test.
        tested: Whether the test split was evaluated.
        predictions: Whether predictions were stored.
        data_root: Where the images lie.
        config: Settings of model, optimizer or batch_norm.
        metrics: Keys of metrics.json to set.

    Returns:
        Its folder.
    """
    name = f"{norm}-bs{batch_size}-seed{seed}"
    folder, number = root / name, 1
    while folder.exists():
        number += 1
        folder = root / f"{name}-{number}"
    folder.mkdir(parents=True)
    right = round(accuracy * images)
    model = {
        "backbone": "resnetv2_18",
        "norm": norm,
        "num_groups": 32,
        "group_size": None,
        **{key: value for key, value in (config or {}).items() if key in ("backbone", "num_groups", "group_size")},
    }
    settings = {
        "seed_everything": seed,
        "data": {
            "class_path": "gn_transfer.data.Pets",
            "init_args": {"root": "pets", "img_size": 64, "batch_size": batch_size, "recipe": "crop_flip"},
        },
        "model": model,
        "optimizer": {"name": "sgd", "lr": (config or {}).get("lr", 0.003)},
        "batch_norm": {
            key: (config or {})[key] for key in ("reestimate_images", "evaluation") if key in (config or {})
        },
        "accumulation": {"effective_batch_size": effective_batch_size},
        "mixed_precision": {"mode": "auto"},
        "trainer": {"max_epochs": 4, "max_steps": -1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    weights = "bn" if norm.startswith("bn") else "gn_ws"
    evaluation = ("test/acc1",) if tested else ()
    values: dict[str, Any] = {
        "format_version": 1,
        "status": "finished",
        "run": f"made_up/{folder.name}",
        **{key: model[key] for key in ("norm", "backbone", "num_groups")},
        "batch_size": batch_size,
        "effective_batch_size": effective_batch_size,
        "img_size": 64,
        "seed": seed,
        "versions": {"torch": "2.11.0"},
        "git_commit": "0123456789ab",
        "device": "cpu AVX512",
        "threads": 1,
        "data_root": data_root,
        "train_split": f"train of seed {seed}",
        "val_split": f"val of seed {seed}",
        "weights": f"gn_transfer:resnetv2_18.{weights}",
        "weights_pretrained_on": "Tiny-ImageNet",
        "epochs": 4,
        "samples_seen": 1600,
        **dict.fromkeys(("val/acc1", "best/val/acc1", *evaluation), right / images),
        "val/loss": 1.0,
        "images_per_sec": 20.0 + (batch_size if isinstance(batch_size, int) else 0),
        "peak_memory_mib": 1000.0,
        "wall_time_s": 80.0,
        **({"test/checkpoint": "best.ckpt", "test_split": "the test images"} if tested else {}),
        **metrics,
    }
    (folder / "metrics.json").write_text(json.dumps(values))
    note = "BiT weights were pretrained on ImageNet-21k, the BN counterparts on ImageNet-1k only"
    (folder / "transfer_report.json").write_text(json.dumps({"notes": [note] if norm == "gn_ws" else []}))
    rows = [[epoch, 400 * epoch, 1 / epoch, accuracy * epoch / 4] for epoch in range(1, 5)]
    _write(folder / "epochs.csv", ["epoch", "samples_seen", "train/loss", "val/acc1"], rows)
    if predictions:
        order = np.random.default_rng(seed).permutation(images)
        targets = [CLASSES[place % len(CLASSES)] for place in range(images)]
        wrong = {int(place) for place in order[right:]}
        for split in ("val", "best_val", *(("test",) if tested else ())):
            said = [CLASSES[(place + (place in wrong)) % len(CLASSES)] for place in range(images)]
            rows = [
                [
                    f"{split[-3:]}_{place}.jpg",
                    targets[place],
                    said[place],
                    *(WRONG if place in wrong else RIGHT),
                ]
                for place in range(images)
            ]
            columns = ["path", "target", "predicted", "prob_target", "prob_predicted"]
            _write(folder / f"predictions_{split}.csv", columns, rows)
    return folder


def _write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
