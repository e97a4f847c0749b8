"""What `gn-transfer fit` costs beside a bare loop on the same work, in images per second.

Both sides train the same model on the same images in the same order with the same engine, optimizer and accumulation;
the bare loop has no Trainer, no callback, no logger. They take turns in one process (A B A B), `fit` is timed without
its first step and without validation, the bare loop likewise.

    python benchmarks/trainer_overhead.py --json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from gn_transfer.__main__ import main as gn_transfer
from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.data import Sample
from gn_transfer.layers import AccumulationEngine
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.environment import environment
from gn_transfer.training.optimizer import create_optimizer, parameter_groups


def bare_loop(options: argparse.Namespace, root: Path) -> float:
    """Train by hand; images per second after the first optimizer step."""
    data = Sample(root, img_size=options.img_size, batch_size=1)
    data.prepare_data()
    data.setup("fit")
    task = TransferClassifier(ModelConfig(options.backbone, options.norm))
    task.build(data.classes)
    assert task.model is not None
    memory_format = task.memory_format("cpu", "bf16-mixed" if options.precision == "bf16" else "32-true")
    model = task.model.to(memory_format=memory_format).train()
    engine = AccumulationEngine(model)
    optimizer = create_optimizer(
        "sgd", parameter_groups(model.named_parameters(), lr=0.001, head=task.head), momentum=0.9
    )
    start, seen = 0.0, 0
    for index, (images, targets) in zip(range(options.images), data.train_dataloader(), strict=False):
        engine.micro_batch(first=index % options.accumulate == 0, last=(index + 1) % options.accumulate == 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            pixels = task.normalize(images).contiguous(memory_format=memory_format)
            loss = F.cross_entropy(model(pixels).float(), targets) / options.accumulate
        loss.backward()
        if (index + 1) % options.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            if index + 1 == options.accumulate:
                start = time.perf_counter()
            elif start:
                seen = index + 1 - options.accumulate
    return seen / (time.perf_counter() - start)


def our_fit(options: argparse.Namespace, root: Path) -> float:
    """Train by the command line; images per second as metrics.json states them."""
    arguments = {
        "data": "Sample",
        "data.root": str(root),
        "data.img_size": str(options.img_size),
        "model.backbone": options.backbone,
        "model.norm": options.norm,
        "optimizer.lr": "0.001",
        "accumulation.effective_batch_size": str(options.accumulate),
        "mixed_precision.mode": options.precision,
        "trainer.max_epochs": "1",
        "trainer.limit_train_batches": str(options.images),
        "trainer.limit_val_batches": "1",
    }
    words = [word for key, value in arguments.items() for word in (f"--{key}", value)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            code = gn_transfer(["fit", *words])
        if code:
            raise SystemExit(code)
        [path] = Path("runs").glob("*/*/metrics.json")
        return float(json.loads(path.read_text())["images_per_sec"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--norm", default="gn_ws")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--accumulate", type=int, default=16)
    parser.add_argument("--images", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "sample"
        bare, fit = [], []
        for _ in range(options.rounds + 1):  # the first round warms up
            bare.append(bare_loop(options, root))
            fit.append(our_fit(options, root))
    ratios = [ours / theirs for ours, theirs in zip(fit[1:], bare[1:], strict=True)]
    result = {
        "what": "images/s of fit against a bare loop",
        **{key: getattr(options, key) for key in ("backbone", "norm", "img_size", "precision", "accumulate", "rounds")},
        "bare_images_per_sec": statistics.median(bare[1:]),
        "fit_images_per_sec": statistics.median(fit[1:]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "cores": os.cpu_count(),
        **environment(),
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"bare {result['bare_images_per_sec']:.2f}  fit {result['fit_images_per_sec']:.2f}  images/s")
        print(f"ratio {result['ratio_median']:.3f} ({result['ratio_min']:.3f} to {result['ratio_max']:.3f})")


if __name__ == "__main__":
    main()
