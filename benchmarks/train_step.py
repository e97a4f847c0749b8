"""Images per second and peak memory of a training step: ours against plain torch loops with timm's models.

A step is some accumulated micro-batches and one fused SGD update. The arms take turns in one process (A B A B),
each in its faster memory layout, which is found first; the second step of a turn is timed. Medians over the rounds,
and ratios within a round. The floor is the time that the convolutions of the model take alone, forward and backward, on
the shapes of the step; on a GPU without their launches, as a CUDA graph. Peak memory is what a process that runs one
arm alone takes beyond its imports; on a GPU, what torch takes there.

    python benchmarks/train_step.py --backbone resnetv2_50 --batch 1 --accumulate 16 --precision bf16 --json
    python benchmarks/train_step.py --backbone resnetv2_50 --decoder unet --img_size 256 --precision fp32 --json
    python benchmarks/train_step.py --device cuda --batch 1 --accumulate 16 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any, get_args

import timm
import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct
from timm.layers import StdConv2d as TimmStdConv2d
from torch import Tensor, nn

from gn_transfer.backbones.create import create_backbone
from gn_transfer.backbones.segmentation import Encoder, SegmentationModel
from gn_transfer.config import DecoderName
from gn_transfer.layers import AccumulationEngine, GraphedModel, fitting_group_count, preferred_memory_format
from gn_transfer.layers.conv import is_depthwise
from gn_transfer.training.environment import environment
from gn_transfer.training.progress import peak_memory_mib, reset_peak_memory

ARMS = ("ours gn_ws", "ours gn", "ours bn", "timm gn_ws", "timm bn")
MORE_ARMS = ("ours bn_frozen", "timm gn", "timm bn_frozen")
COMPILED = "ours gn_ws compiled"
WITHOUT_GRAPHS = ("ours gn_ws engine", "ours bn_frozen engine")  # on a GPU; there the others of ours are replayed
CLASSES = 37
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def build(arm: str, options: argparse.Namespace) -> nn.Module:
    """Build an arm's model, from scratch; with a decoder it segments, and frozen norms get a decoder under gn."""
    torch.manual_seed(0)
    side, norm = arm.split()[:2]
    model = _classifier(side, norm, options)
    if options.decoder is None:
        return model
    decoder_norm = "gn" if norm == "bn_frozen" else norm
    segments = SegmentationModel(Encoder(model, 3), options.decoder, CLASSES, decoder_norm if side == "ours" else "bn")
    if side == "timm" and decoder_norm != "bn":
        with_torch_group_norm(segments.decoder)
    return segments


def _classifier(side: str, norm: str, options: argparse.Namespace) -> nn.Module:
    backbone, stride = options.backbone, 16 if options.decoder == "deeplabv3plus" else 32
    if side == "ours":
        return create_backbone(backbone, norm=norm, num_classes=CLASSES, output_stride=stride).model
    arguments: dict[str, Any] = {"num_classes": CLASSES, **({"output_stride": stride} if stride != 32 else {})}
    if norm == "gn_ws":
        arguments["norm_layer"] = partial(GroupNormAct, num_groups=32)
        arguments["conv_layer"] = partial(TimmStdConv2d, eps=1e-8)
    model = timm.create_model(backbone, **arguments)
    return with_torch_group_norm(model) if norm == "gn" else model


def with_torch_group_norm(model: nn.Module) -> nn.Module:
    """Replace batch norms by torch's group norm, with the groups that ours has: what a plain loop would do."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            norm = nn.GroupNorm(fitting_group_count(layer.num_features), layer.num_features)
            extra = [getattr(layer, part) for part in ("drop", "act") if hasattr(layer, part)]
            setattr(model.get_submodule(parent), child, nn.Sequential(norm, *extra))
    return model


class Arm:
    """A model with its optimizer and a batch, ready to run steps."""

    def __init__(self, arm: str, layout: str, options: argparse.Namespace) -> None:
        self.options = options
        self.model = build(arm, options).train().to(memory_format=LAYOUTS[layout])
        if arm == "timm bn_frozen":
            for layer in self.model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
        self.model.to(options.device)
        ours, compiled = arm.startswith("ours"), arm.endswith("compiled")
        replayed = ours and options.device == "cuda" and not compiled and arm not in WITHOUT_GRAPHS
        self.engine = AccumulationEngine(self.model, compiled=compiled) if ours and not replayed else None
        if compiled:
            self.model.compile()
        self.run = GraphedModel(self.model) if replayed else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, fused=True)
        size = options.img_size
        images = torch.randn(options.batch, 3, size, size, device=options.device)
        self.images = images.contiguous(memory_format=LAYOUTS[layout])
        shape = (options.batch,) if options.decoder is None else (options.batch, size, size)
        self.targets = torch.randint(CLASSES, shape, device=options.device)
        if self.engine is not None:
            self.engine.fold_norms(self.images)

    def step(self) -> float:
        """Run one accumulation step; images per second."""
        count = self.options.accumulate
        synchronize(self.options)
        began = time.perf_counter()
        for index in range(count):
            with autocast(self.options):
                if self.engine is not None:
                    self.engine.micro_batch(first=index == 0, last=index == count - 1)
                loss = F.cross_entropy(self.run(self.images).float(), self.targets) / count
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.options)
        return self.options.batch * count / (time.perf_counter() - began)


def autocast(options: argparse.Namespace) -> torch.autocast:
    """Autocast of the chosen precision."""
    return torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.precision == "bf16")


def synchronize(options: argparse.Namespace) -> None:
    """Wait until a GPU has done what it was given."""
    if options.device == "cuda":
        torch.cuda.synchronize()


def best_layout(arm: str, options: argparse.Namespace) -> str:
    """Find the faster layout of an arm: ours takes its own rule, the others are tried."""
    if arm.startswith("ours"):
        format_ = preferred_memory_format(
            arm.split()[1],  # type: ignore[arg-type]
            options.device,
            segments=options.decoder is not None,
            depthwise=any(is_depthwise(layer) for layer in build(arm, options).modules()),
            half=options.precision == "bf16",
        )
        return next(name for name, value in LAYOUTS.items() if value == format_)
    speeds = {}
    for layout in LAYOUTS:
        trial = Arm(arm, layout, options)
        trial.step()
        speeds[layout] = max(trial.step() for _ in range(2))
    return max(speeds, key=lambda layout: speeds[layout])


def floor_seconds(options: argparse.Namespace) -> float:
    """Time the model's convolutions alone, forward and backward of a micro-batch, weights cast beforehand."""
    model = build("timm bn", options)
    calls: list[tuple[nn.Conv2d, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        calls.append((module, inputs[0]))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    size = options.img_size
    with torch.no_grad():
        model.train()(torch.randn(max(2, options.batch), 3, size, size))
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    work = []
    for index, (module, example) in enumerate(calls):
        shape = (options.batch, *example.shape[1:])
        on = {"device": options.device, "dtype": dtype, "memory_format": torch.channels_last}
        x = torch.randn(shape).to(**on).requires_grad_(index > 0)
        w = module.weight.detach().to(**on).requires_grad_()
        same = "Same" in type(module).__name__  # TensorFlow's padding: as much, up to one row and column
        padding = module.kernel_size[0] // 2 if same else module.padding
        geometry = (module.stride, padding, module.dilation, module.groups)
        work.append((x, w, geometry, torch.randn_like(F.conv2d(x, w, None, *geometry))))

    def convolve() -> None:
        for x, w, geometry, gradient in work:
            y = F.conv2d(x, w, None, *geometry)
            torch.autograd.grad(y, [x, w] if x.requires_grad else [w], gradient)

    run = convolve
    if options.device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            convolve()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            convolve()
        run = graph.replay
    times = []
    for _ in range(options.rounds + 1):
        synchronize(options)
        began = time.perf_counter()
        run()
        synchronize(options)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def peak_mib(arm: str, layout: str, options: argparse.Namespace, arguments: list[str]) -> float:
    """Peak resident memory of a process that runs one arm alone, beyond what the imports took: median of three.

    On a GPU it is what torch takes for the arm, in this process.
    """
    if options.device == "cuda":
        return alone(arm, layout, options)
    command = [sys.executable, __file__, *arguments, "--alone", arm, "--layout", layout]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
    return statistics.median(float(run.stdout.strip().splitlines()[-1]) for run in runs)


def alone(name: str, layout: str, options: argparse.Namespace) -> float:
    """Peak memory of a few steps of one arm, in MiB."""
    device = torch.device(options.device)
    reset_peak_memory(device)
    before = peak_memory_mib(device)
    arm = Arm(name, layout, options)
    for _ in range(3):  # the second is the first with the optimizer's momentum
        arm.step()
    return peak_memory_mib(device) - before


def measure(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Measure all arms in turn."""
    layouts = {arm: best_layout(arm, options) for arm in options.arms}
    arms = {arm: Arm(arm, layouts[arm], options) for arm in options.arms}
    for arm in arms.values():
        arm.step()
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            arm.step()  # the arm before has left its data in caches and heap
            speeds[name].append(arm.step())
    floor = options.batch / floor_seconds(options)
    rows = []
    for name, values in speeds.items():
        row: dict[str, Any] = {
            "arm": name,
            "layout": layouts[name],
            "images_per_sec": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
            "of_floor": round(statistics.median(values) / floor, 3),
            "peak_mib": round(peak_mib(name, layouts[name], options, arguments), 1),
        }
        for other in ("timm gn_ws", "timm bn", "timm gn", "timm bn_frozen"):
            if other in speeds:
                ratios = [ours / theirs for ours, theirs in zip(values, speeds[other], strict=True)]
                row[f"ratio to {other}"] = round(statistics.median(ratios), 3)
        rows.append(row)
    keys = ("backbone", "decoder", "batch", "accumulate", "precision", "img_size", "rounds")
    return {
        **{key: getattr(options, key) for key in keys},
        "floor_images_per_sec": round(floor, 3),
        "rows": rows,
        "cores": os.cpu_count(),
        **environment(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnetv2_50")
    parser.add_argument("--decoder", choices=get_args(DecoderName), help="segment, with this decoder")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *MORE_ARMS, COMPILED, *WITHOUT_GRAPHS], default=list(ARMS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(alone(options.alone, options.layout, options))
        return
    result = measure(options, [word for word in sys.argv[1:] if word != "--json"])
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"floor {result['floor_images_per_sec']:.2f} images/s")
    for row in result["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
