"""Peak memory of training by backbone, norm, batch size, resolution and gradient checkpointing.

Each configuration runs an accumulation step of two micro-batches and an SGD step, twice, in a process of its own, and
reports the peak resident memory of that process less what it held once torch and the package were imported; on a GPU
the most that was allocated there.

    python benchmarks/memory.py --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.layers import AccumulationEngine, GraphedModel
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.environment import environment
from gn_transfer.training.optimizer import create_optimizer, parameter_groups
from gn_transfer.training.progress import peak_memory_mib


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Train two steps of two micro-batches; memory in MiB."""
    device = torch.device(settings["device"])
    before = peak_memory_mib(device)
    config = ModelConfig(settings["backbone"], settings["norm"], gradient_checkpointing=settings["checkpointing"])
    task = TransferClassifier(config)
    task.build([f"class{index}" for index in range(37)])
    assert task.model is not None
    memory_format = task.memory_format(device.type)
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
    targets = torch.arange(settings["batch"], device=device) % 37
    for index in range(4):
        if engine is not None:
            engine.micro_batch(first=index % 2 == 0, last=index % 2 == 1)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings["precision"] == "bf16"):
            loss = F.cross_entropy(run(pixels).float(), targets)
        loss.backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    peak = peak_memory_mib(device)
    return {"peak_mib": round(peak - before, 1), "process_mib": round(peak, 1)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnetv2_18", "resnetv2_50"])
    parser.add_argument("--norm", nargs="+", default=["bn", "gn_ws"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--img_size", nargs="+", type=int, default=[224])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.settings:
        print(json.dumps(measure(json.loads(options.settings))))
        return
    rows = []
    for backbone, norm, batch, img_size, checkpointing in itertools.product(
        options.backbone, options.norm, options.batch, options.img_size, (False, True)
    ):
        wanted: dict[str, Any] = {
            "backbone": backbone,
            "norm": norm,
            "batch": batch,
            "img_size": img_size,
            "precision": options.precision,
            "checkpointing": checkpointing,
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
