"""What is left of a batch-norm model after its norms were replaced: at once, under a linear probe, and fine-tuned.

Measures, for one backbone with BN weights:

- `source`: top-1 right after the replacement, with the model's own head, no training: the BN original, the naive copy
  of its affine into group norms, the calibrated conversion for several numbers of groups and of images, the distilled
  one, and the real GN+WS model where one is given. On Tiny-ImageNet's validation images, or for weights of ImageNet on
  the images of those breeds of pets5 that are classes of ImageNet.
- `probe`: five-fold accuracy of a logistic regression on the pooled features of the 500 trainval images of pets5.
- `recovered` is the share of the way from the naive copy to the BN original, of either figure.
- `finetune`: test accuracy on pets5 after `gn-transfer fit` at batch size 1, the same recipe and number of samples for
  every arm, mean over seeds; `last.ckpt` is tested, nothing is chosen by it.

    python benchmarks/conversion.py --backbone resnetv2_18 --tiny_imagenet DATA --pets DATA --json FILE
    python benchmarks/conversion.py --backbone tf_efficientnet_lite0 --pets DATA --img_size 224 --json FILE
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from gn_transfer.__main__ import main as gn_transfer
from gn_transfer.backbones.fitting import DISTILLATION_SAMPLES, TrainingImages, fit_norms, no_progress
from gn_transfer.backbones.pretrained import resolve_pretrained
from gn_transfer.backbones.transfer import TransferReport
from gn_transfer.backbones.weights import Weights, read_weights
from gn_transfer.data import Pets, TinyImageNet
from gn_transfer.layers import Replacement, StdConv2d, convert_norm
from gn_transfer.layers.calibrate import BatchNormFunction, calibrate
from gn_transfer.training.environment import environment

IMAGENET_CLASSES = {"german_shorthaired": 210}
"""Breeds of pets5 that are classes of ImageNet, with their index."""


class Source:
    """Images that a model converts on and is scored on with its own head: of Tiny-ImageNet, or of pets5."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.tiny_imagenet is not None:
            data = TinyImageNet(options.tiny_imagenet, num_workers=0, batch_size=250)
            data.setup("fit")
            step = max(1, len(data.val_dataset) // options.limit)
            pairs = [data.val_dataset[index] for index in range(0, len(data.val_dataset), step)]
        else:
            data = Pets(options.pets, img_size=options.img_size, num_workers=0)
            data.setup("fit")
            pairs = [
                (image, IMAGENET_CLASSES[data.classes[target]])
                for split in (data.train_dataset, data.val_dataset)
                for image, target in split_plain(split, data)
                if data.classes[target] in IMAGENET_CLASSES
            ]
        self.training = data.training_images(max(*options.images, DISTILLATION_SAMPLES))
        self.images = torch.stack([image for image, _ in pairs])
        self.targets = torch.tensor([target for _, target in pairs])

    @torch.no_grad()
    def accuracy(self, model: nn.Module, weights: Weights) -> float:
        """Top-1 on the validation images."""
        model.eval()
        at_once = 250 if self.options.img_size <= 64 else 4
        logits = torch.cat([model(normalized(part, weights)) for part in self.images.split(at_once)])
        return float((logits.argmax(1) == self.targets).float().mean())


def normalized(images: Tensor, weights: Weights) -> Tensor:
    """Scale pixels as the weights expect them."""
    assert weights.mean is not None
    assert weights.std is not None
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (weights.mean, weights.std))
    return (images.float() / 255 - mean) / std


def load(pretrained: str, backbone: str, norm: str) -> tuple[nn.Module, Weights]:
    """Build a model with its own head and load it whole."""
    weights = resolve_pretrained(backbone, norm, pretrained)  # type: ignore[arg-type]
    assert weights is not None
    state = read_weights(weights)
    if weights.mean is None:  # a bare file: pixels as the architecture's default has them
        config = timm.get_pretrained_cfg(backbone).to_dict()
        weights = replace(weights, mean=config["mean"], std=config["std"])
    head = timm.create_model(backbone).pretrained_cfg["classifier"]
    model = timm.create_model(backbone, num_classes=len(state[f"{head}.weight"]))
    convert_norm(model, norm, skip=[head])  # type: ignore[arg-type]
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return model.eval(), weights


def to_gn_ws(model: nn.Module, head: str, groups: int, batches: list[Tensor]) -> nn.Module:
    """Convert BN to GN+WS, the affine calibrated: an experiment that `model.conversion` does not offer.

    The original's half of each doubled batch goes through the convolutions as they were trained, the converted model's
    half through the standardized ones.
    """
    functions = {name: BatchNormFunction.of(layer) for name, layer in model.named_modules()}
    convert_norm(model, "gn_ws", num_groups=groups, skip=[head])
    layers = dict(model.named_modules())
    originals = {
        layer: function
        for name, function in functions.items()
        if function is not None and isinstance(layer := layers[name], nn.GroupNorm)
    }
    standardized = [layer for layer in layers.values() if isinstance(layer, StdConv2d)]

    def both(layer: StdConv2d) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            theirs, ours = input.chunk(2)
            return torch.cat([layer._conv_forward(theirs, layer.weight, layer.bias), StdConv2d.forward(layer, ours)])

        return forward

    for layer in standardized:
        layer.forward = both(layer)  # type: ignore[method-assign]
    calibrate(model, originals, batches)
    for layer in standardized:
        del layer.forward
    return model


def distilled(model: nn.Module, head: str, groups: int, images: Tensor, weights: Weights) -> str:
    """Convert a BN model as `model.conversion: distilled` does; what that says of it."""
    assert weights.mean is not None
    assert weights.std is not None
    report = TransferReport(weights.name, weights.architecture, "gn")
    training = TrainingImages(images, weights.mean, weights.std)
    options = {"num_groups": groups, "group_size": None}
    done = fit_norms(model, "gn", training, report, head=head, groups=options, conversion="distilled", show=no_progress)
    return done.notes[-1]


def pets_features(model: nn.Module, weights: Weights, root: Path, img_size: int) -> tuple[Tensor, Tensor]:
    """Pooled features and targets of pets5's trainval images."""
    data = Pets(root, img_size=img_size, num_workers=0)
    data.setup("fit")
    pairs = [pair for split in (data.train_dataset, data.val_dataset) for pair in (split_plain(split, data))]
    images, targets = torch.stack([image for image, _ in pairs]), torch.tensor([target for _, target in pairs])
    with torch.no_grad():
        features = torch.cat(
            [
                model.forward_head(model.forward_features(normalized(part, weights)), pre_logits=True)
                for part in images.split(100 if img_size <= 64 else 4)
            ]  # type: ignore[operator]
        )
    return features.flatten(1), targets


def split_plain(split: Any, data: Pets) -> list[tuple[Tensor, int]]:
    """Read a split without augmentation."""
    plain = type(split)(split.root, split.images, data.img_size)
    return [plain[index] for index in range(len(plain))]


def probe(model: nn.Module, weights: Weights, root: Path, img_size: int) -> float:
    """Five-fold accuracy of a logistic regression."""
    features, targets = pets_features(model.eval(), weights, root, img_size)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(model, features.numpy(), targets.numpy(), cv=folds).mean())


def finetune(arm: dict[str, str], options: argparse.Namespace, seed: int) -> float:
    """Test accuracy of one run of `gn-transfer fit` at batch size 1."""
    arguments = {
        "data": "Pets",
        "data.root": str(options.pets.resolve()),
        "data.img_size": str(options.img_size),
        "data.batch_size": "1",
        "data.num_workers": "0",
        "seed_everything": str(seed),
        "model.backbone": options.backbone,
        "optimizer.lr": str(options.lr),
        "accumulation.effective_batch_size": "8",
        "trainer.max_epochs": str(options.epochs),
        **arm,
    }
    words = [word for key, value in arguments.items() for word in (f"--{key}", value)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            for command in (["fit", *words], ["test", "--ckpt_path", "last"]):
                if code := gn_transfer(command):
                    raise SystemExit(code)
        [path] = Path("runs").glob("*/*/metrics.json")
        return float(json.loads(path.read_text())["test/acc1"])


def source_and_probe(options: argparse.Namespace) -> dict[str, Any]:
    """Convert in every way and measure without training."""
    images = Source(options)
    result: dict[str, Any] = {"scored_images": len(images.images)}

    def measure(name: str, model: nn.Module, weights: Weights, **more: Any) -> None:
        result[name] = {"source_acc1": images.accuracy(model, weights), **more}
        if options.pets is not None:
            result[name]["probe_acc1"] = probe(model, weights, options.pets, options.img_size)
        print(name, result[name]["source_acc1"], result[name].get("probe_acc1"), more, flush=True)

    original, weights = load(options.bn, options.backbone, "bn")
    measure("bn original", original, weights)
    head = timm.create_model(options.backbone).pretrained_cfg["classifier"]
    for groups in options.groups:
        model, _ = load(options.bn, options.backbone, "bn")
        measure(f"gn {groups} naive copy", convert_norm(model, "gn", num_groups=groups, skip=[head]), weights)
        for count in options.images if groups == options.groups[0] else options.images[:1]:
            model, _ = load(options.bn, options.backbone, "bn")
            batches = normalized(images.training[:count], weights).split(64 if options.img_size <= 64 else 2)
            report: list[Replacement] = []
            began = time.monotonic()
            convert_norm(model, "gn", num_groups=groups, skip=[head], calibration=batches, report=report)
            seconds = round(time.monotonic() - began, 1)
            shares = {found.name: found.r2 for found in report if found.r2 is not None}
            name = f"gn {groups} calibrated" + ("" if count == options.images[0] else f" on {count}")
            measure(name, model, weights, images=count, seconds=seconds, r2=shares)
        model, _ = load(options.bn, options.backbone, "bn")
        began = time.monotonic()
        said = distilled(model, head, groups, images.training, weights)
        measure(f"gn {groups} distilled", model, weights, seconds=round(time.monotonic() - began, 1), said=said)
    for groups in (32, options.groups[0]) if options.gn_ws is not None else ():
        model, _ = load(options.bn, options.backbone, "bn")
        measure(f"gn_ws {groups} naive copy", convert_norm(model, "gn_ws", num_groups=groups, skip=[head]), weights)
        model, _ = load(options.bn, options.backbone, "bn")
        batches = list(normalized(images.training[: options.images[0]], weights).split(64))
        measure(f"gn_ws {groups} calibrated (experiment)", to_gn_ws(model, head, groups, batches), weights)
    if options.gn_ws is not None:
        measure("gn_ws trained as such", *load(options.gn_ws, options.backbone, "gn_ws"))
    for name, row in result.items():
        if name.startswith("gn ") and "naive" not in name:
            floor, top = result[f"gn {name.split()[1]} naive copy"], result["bn original"]
            for key in ("source_acc1", "probe_acc1"):
                if key in row and top[key] > floor[key]:
                    row[f"recovered_{key}"] = (row[key] - floor[key]) / (top[key] - floor[key])
    return result


def finetuned(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune every arm with every seed, arms in turn within a seed."""
    bn, gn = options.bn, {"model.norm": "gn", "model.pretrained": options.bn}
    arms: dict[str, dict[str, str]] = {
        "bn from scratch": {"model.norm": "bn"},
        "gn from scratch": {"model.norm": "gn"},
        "gn_ws from scratch": {"model.norm": "gn_ws"},
        "gn naive copy": {**gn, "model.conversion": "copy"},
        **{
            f"gn {groups} calibrated": {**gn, "model.conversion": "calibrated", "model.num_groups": str(groups)}
            for groups in options.groups
        },
        **{
            f"gn {groups} distilled": {**gn, "model.conversion": "distilled", "model.num_groups": str(groups)}
            for groups in options.groups
        },
        "bn_frozen": {"model.norm": "bn_frozen", "model.pretrained": bn},
        "bn": {"model.norm": "bn", "model.pretrained": bn},
    }
    if options.gn_ws is not None:
        arms["gn_ws trained as such"] = {"model.norm": "gn_ws", "model.pretrained": options.gn_ws}
    scores: dict[str, list[float]] = {name: [] for name in arms if not options.arms or name in options.arms}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in scores:
            scores[name].append(finetune(arms[name], options, seed))
            print(name, scores[name], flush=True)
    return {name: {"test_acc1": found, "mean": statistics.mean(found)} for name, found in scores.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bn", default="auto", help="BN weights, as model.pretrained takes them")
    parser.add_argument("--gn_ws", help="the same backbone trained with GN+WS")
    parser.add_argument("--img_size", type=int, default=64, help="of pets5; Tiny-ImageNet has 64")
    parser.add_argument("--backbone", default="resnetv2_18")
    parser.add_argument("--tiny_imagenet", type=Path, help="folder of Tiny-ImageNet; without it no source accuracy")
    parser.add_argument("--pets", type=Path, help="folder of pets5; without it neither probe nor fine-tuning")
    parser.add_argument("--limit", type=int, default=10_000, help="validation images of Tiny-ImageNet")
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 1, 2, 8, 16, 32])
    parser.add_argument("--images", type=int, nargs="+", default=[256, 64, 128, 512, 1024])
    parser.add_argument("--seeds", type=int, default=0, help="fine-tuning runs per arm; 0 leaves them out")
    parser.add_argument("--first_seed", type=int, default=0, help="seeds are this one and those after it")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--arms", nargs="+", help="only these arms of the fine-tuning")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    kept = ("backbone", "img_size", "limit", "seeds", "first_seed", "epochs", "lr")
    result: dict[str, Any] = {
        "what": "accuracy after replacing the norms of a BN model",
        "weights": options.bn,
        **{key: getattr(options, key) for key in kept},
    }
    if options.tiny_imagenet is not None or options.img_size > 64:
        result["untrained"] = source_and_probe(options)
    if options.seeds:
        result["finetuned"] = finetuned(options)
    result |= {"cores": os.cpu_count(), **environment()}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
