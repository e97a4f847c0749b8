"""Speed and peak memory of training by backbone, norm, batch size, resolution, classes and gradient checkpointing.

Each configuration runs accumulation steps of two micro-batches and an SGD step in a process of its own. It reports
images/s, the median of three steps after two, and the peak resident memory of that process less what it held once torch
and the package were imported; on a GPU the most that torch took there. Beside them stand their limits: images/s of
the convolutions alone (see ``train_step.py``), and the memory of weights, gradients and momentum.

    python benchmarks/cost.py --norm gn_ws --batch 1 2 4 8 16 --json
    python benchmarks/cost.py --norm gn_ws --batch 1 --classes 10 100 1000 10000
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from train_step import floor_seconds

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.layers import AccumulationEngine, GraphedModel
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.environment import environment
from gn_transfer.training.optimizer import create_optimizer, parameter_groups
from gn_transfer.training.progress import peak_memory_mib


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Train five steps of two micro-batches; memory in MiB."""
    device = torch.device(settings["device"])
    before = peak_memory_mib(device)
    config = ModelConfig(settings["backbone"], settings["norm"], gradient_checkpointing=settings["checkpointing"])
    task = TransferClassifier(config)
    task.build([f"class{index}" for index in range(settings["classes"])])
    assert task.model is not None
    memory_format = task.memory_format(device.type, "bf16-mixed" if settings["precision"] == "bf16" else "32-true")
    model = task.model.to(device).to(memory_format=memory_format).train()
    replays = GradientAccumulation().replays(config, device)
    engine = None if replays else AccumulationEngine(model)
    run = GraphedModel(model) if replays else model
    optimizer = create_optimizer(
        "sgd", parameter_groups(model.named_parameters(), lr=1e-4, head=task.head), momentum=0.9
    )
    pixels = torch.randn(settings["batch"], 3, settings["img_size"], settings["img_size"], device=device)
    pixels = pixels.contiguous(memory_format=memory_format)
    if engine is not None:
        engine.fold_norms(pixels)
    targets = torch.arange(settings["batch"], device=device) % settings["classes"]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for index in range(2):
            if engine is not None:
                engine.micro_batch(first=index == 0, last=index == 1)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings["precision"] == "bf16"):
                loss = F.cross_entropy(run(pixels).float(), targets)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    peak = peak_memory_mib(device)
    state_mib = 3 * sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    floor = settings["batch"] / floor_seconds(argparse.Namespace(**settings, decoder=None, rounds=3))
    speed = 2 * settings["batch"] / statistics.median(seconds[2:])
    return {
        "images_per_sec": round(speed, 3),
        "floor_images_per_sec": round(floor, 3),
        "peak_mib": round(peak - before, 1),
        "process_mib": round(peak, 1),
        "state_mib": round(state_mib, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnetv2_18", "resnetv2_50"])
    parser.add_argument("--norm", nargs="+", default=["bn", "gn_ws"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--img_size", nargs="+", type=int, default=[224])
    parser.add_argument("--classes", nargs="+", type=int, default=[37])
    parser.add_argument("--checkpointing", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.settings:
        print(json.dumps(measure(json.loads(options.settings))))
        return
    rows = []
    for backbone, norm, batch, img_size, classes, checkpointing in itertools.product(
        options.backbone, options.norm, options.batch, options.img_size, options.classes, options.checkpointing
    ):
        wanted: dict[str, Any] = {
            "backbone": backbone,
            "norm": norm,
            "batch": batch,
            "img_size": img_size,
            "precision": options.precision,
            "classes": classes,
            "checkpointing": bool(checkpointing),
            "device": options.device,
        }
        done = subprocess.run(
            [sys.executable, __file__, "--settings", json.dumps(wanted)], check=True, capture_output=True, text=True
        )
        rows.append({**wanted, **json.loads(done.stdout.strip().splitlines()[-1])})
        if not options.json:
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        print(json.dumps({"rows": rows, "cores": os.cpu_count(), **environment()}, indent=2))


if __name__ == "__main__":
    main()
