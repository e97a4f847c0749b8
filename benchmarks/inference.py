"""Latency (batch 1) and throughput (batch 32) on a CPU: our bundles against timm's eager nets.

Contenders, all of ResNet-50 size with random weights (no time depends on them):

- bundle gn_ws: ResNetV2-50, GroupNorm + Weight Standardization, as ``gn-transfer export`` writes it; uint8 in.
- bundle bn: ResNetV2-50 with BatchNorm, as ``gn-transfer export`` writes it (only BN behind a convolution folds).
- folded resnet50: ResNet-50 (v1) with BatchNorm, every one folded, in onnxruntime: the fastest of its size.
- timm gn_ws, timm bn: ResNetV2-50 in torch, eager, inference mode, float32 pixels in.

All in one process, in turn (A B C A B C), the first rounds left out; medians, and ratios of medians per round.

    python benchmarks/inference.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from timm.layers import GroupNormAct, StdConv2d

from gn_transfer.backbones.create import rebuild
from gn_transfer.config import Norm
from gn_transfer.inference.bundle import open_graph
from gn_transfer.inference.onnx_graph import InferenceModel, write_onnx
from gn_transfer.training.environment import environment

CLASSES = 37


def write_bundle_graph(backbone: str, norm: Norm, head: str, img_size: int, path: Path) -> Path:
    """Write the graph that export would write for this net."""
    torch.manual_seed(0)
    net = rebuild(backbone, norm=norm, num_classes=CLASSES, head=head, num_groups=32, group_size=None)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.GroupNorm):  # nothing that could be folded away as one
            torch.nn.init.uniform_(layer.weight, 0.2, 0.5)
            torch.nn.init.uniform_(layer.bias, -0.1, 0.1)
    write_onnx(InferenceModel(net, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), img_size, path)
    return path


def eager(net: torch.nn.Module) -> Callable[[np.ndarray], None]:
    """Run a net of torch on float32 pixels."""
    net = net.eval()

    def run(images_BHWC: np.ndarray) -> None:
        with torch.inference_mode():
            net(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float().div_(255).contiguous())

    return run


def graph(path: Path, threads: int) -> Callable[[np.ndarray], None]:
    """Run a graph in onnxruntime on uint8 pixels."""
    session = open_graph(path, threads)
    return lambda images_BHWC: session.run(None, {"images": images_BHWC})


def measure(
    contenders: dict[str, Callable[[np.ndarray], None]], images_BHWC: np.ndarray, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Time every contender in every round; seconds per run."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            run(images_BHWC)  # each round warms up: the contenders push each other out of the caches
            began = time.perf_counter()
            for _ in range(repeats):
                run(images_BHWC)
            seconds[name].append((time.perf_counter() - began) / repeats)
    return {name: values[1:] for name, values in seconds.items()}


def profile(path: Path, threads: int, images_BHWC: np.ndarray, runs: int = 20) -> dict[str, float]:
    """Sum the median time of every operator, in milliseconds per run, by its kind."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    options.profile_file_prefix = str(path)
    session = onnxruntime.InferenceSession(path, options)
    for _ in range(runs):
        session.run(None, {"images": images_BHWC})
    nodes = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            nodes[event["name"], event["args"]["op_name"]].append(event["dur"] / 1e3)
    kinds: dict[str, float] = defaultdict(float)
    for (_, kind), values in nodes.items():
        kinds[kind] += statistics.median(values)
    return {kind: round(total, 2) for kind, total in sorted(kinds.items(), key=lambda item: -item[1]) if total > 0.05}


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median, least and greatest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    std_conv = partial(StdConv2d, eps=1e-8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = {
            "bundle gn_ws": ("resnetv2_50", "gn_ws", "head.fc"),
            "bundle bn": ("resnetv2_50", "bn", "head.fc"),
            "folded resnet50": ("resnet50", "bn", "fc"),
        }
        paths = {
            name: write_bundle_graph(*arguments, options.img_size, folder / f"{name}.onnx")  # type: ignore[arg-type]
            for name, arguments in graphs.items()
        }
        contenders = {name: graph(path, options.threads) for name, path in paths.items()}
        contenders["timm gn_ws"] = eager(
            timm.create_model("resnetv2_50", num_classes=CLASSES, norm_layer=GroupNormAct, conv_layer=std_conv)
        )
        contenders["timm bn"] = eager(timm.create_model("resnetv2_50", num_classes=CLASSES))
        images = np.random.default_rng(0).integers(0, 256, (32, options.img_size, options.img_size, 3), dtype=np.uint8)
        one = measure(contenders, images[:1], options.rounds, repeats=5)
        profiles = {  # the quietest of three
            name: min((profile(path, options.threads, images[:1]) for _ in range(3)), key=lambda p: sum(p.values()))
            for name, path in paths.items()
        }
        many = measure(contenders, images, rounds=3, repeats=1)
    ours = "bundle gn_ws"
    result: dict[str, Any] = {
        "what": "CPU inference of ResNet-50 size",
        "img_size": options.img_size,
        "threads": options.threads,
        "rounds": options.rounds,
        "latency_ms_batch_1": {name: spread([1e3 * s for s in values], 2) for name, values in one.items()},
        "images_per_sec_batch_32": {name: spread([32 / s for s in values], 2) for name, values in many.items()},
        "latency_of_bundle_gn_ws_as_part_of": {
            name: spread([a / b for a, b in zip(one[ours], one[name], strict=True)], 3) for name in one if name != ours
        },
        "operators_ms_batch_1": profiles,
        "cores": os.cpu_count(),
        "onnxruntime": onnxruntime.__version__,
        **{key: value for key, value in environment().items() if key != "threads"},
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name in contenders:
        latency, rate = result["latency_ms_batch_1"][name], result["images_per_sec_batch_32"][name]
        print(f"{name:<16} {latency['median']:7.1f} ms   {rate['median']:6.1f} images/s at batch 32")


if __name__ == "__main__":
    main()
