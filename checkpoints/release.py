"""Turn a checkpoint of `gn-transfer fit` into a released backbone: float16 weights and a model card in this folder.

    python checkpoints/release.py checkpoints/pretrain_tinyimagenet/bn-bs128-seed0/best.ckpt --data_root DATA

The accuracy on the card is measured here, on the validation images of the run's own data, with the float16 weights.
Commit the two files; `pretrained: auto` finds them by their name.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from gn_transfer import data as data_modules
from gn_transfer.backbones.create import rebuild
from gn_transfer.backbones.released import Card, Preprocessing, TrainedNorm, Training, round_to_half, write_released
from gn_transfer.config import ConfigError
from gn_transfer.data import ImageDataModule
from gn_transfer.training.checkpoint import read_checkpoint
from gn_transfer.training.run_folder import run_of_checkpoint

PREPROCESSING = (
    "centre square of 87.5 % of the short side, resized to img_size (area averaging down, bilinear up); then "
    "(pixel / 255 - mean) / std"
)
TERMS = (
    "Weights: Apache-2.0, trained by gn_transfer. They were trained on {data}, whose images come with terms of their "
    "own (for Tiny-ImageNet those of ImageNet: non-commercial research and education)."
)


def release(checkpoint: Path, data: ImageDataModule, folder: Path, terms: str, history: str = "") -> Path:
    """Write weights and card.

    Args:
        checkpoint: A checkpoint in its run's folder.
        data: The run's data, to be set up for validation.
        folder: Where to write.
        terms: Licence note.
        history: How training went where the last configuration does not say it.

    Returns:
        Path of the weights.

    Raises:
        ConfigError: No such checkpoint, one whose run is not there, or other classes.
    """
    content = read_checkpoint(checkpoint)
    ours = content["gn_transfer"]
    run = run_of_checkpoint(checkpoint)
    if run is None:
        raise ConfigError(f"{checkpoint}: the run's folder under runs/ is not there; the card states what it holds.")
    metrics = json.loads((run.logs / "metrics.json").read_text(encoding="utf-8"))
    data.setup("validate")
    if data.classes != ours["classes"]:
        raise ConfigError(f"{checkpoint} knows other classes than the images of {data.root}.")
    built = ours["architecture"]
    model = rebuild(
        built["architecture"],
        norm=built["norm"],
        num_classes=len(ours["classes"]),
        head=built["head"],
        num_groups=built["num_groups"],
        group_size=built["group_size"],
    )
    weights = {key.removeprefix("model."): v for key, v in content["state_dict"].items() if key.startswith("model.")}
    model.load_state_dict(weights)
    round_to_half(model)
    dataset = type(data).__name__.lower()
    card = Card(
        name=f"{built['backbone']}.{built['norm']}.{dataset}",
        backbone=built["backbone"],
        norm=TrainedNorm(built["norm"], built["num_groups"], built["group_size"]),
        val_acc1=accuracy(model, data, built["mean"], built["std"]),
        preprocessing=Preprocessing(built["mean"], built["std"], data.img_size, PREPROCESSING),
        sha256="",
        license=terms.format(data=type(data).__name__),
        training=Training(
            dataset=dataset,
            classes=ours["classes"],
            samples_seen=metrics["samples_seen"],
            config=without_paths(ours["config"]),
            environment={key: metrics[key] for key in ("versions", "git_commit", "device", "wall_time_s")},
            history=history,
        ),
    )
    return write_released(model.state_dict(), card, folder)


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: ImageDataModule, mean: list[float], std: list[float]) -> float:
    """Validation top-1, in [0, 1]."""
    model.eval()
    center, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    right = total = 0
    for images, targets in data.val_dataloader():
        right += int((model((images.float() / 255 - center) / scale).argmax(1) == targets).sum())
        total += len(targets)
    return right / total


def without_paths(config: dict[str, object]) -> dict[str, object]:
    """Drop what belongs to the machine that trained: where its images lay, workers, loggers."""
    data = config["data"]
    assert isinstance(data, dict)
    kept = {key: value for key, value in data["init_args"].items() if key not in ("root", "num_workers")}
    sections = ("seed_everything", "model", "optimizer", "regularization", "batch_norm", "freezing", "accumulation")
    epochs = config["trainer"]["max_epochs"]  # type: ignore[index]
    return {
        **{key: config[key] for key in sections if key in config},
        "data": {**data, "init_args": kept},
        "trainer": {"max_epochs": epochs},
    }


def main() -> int:
    """Release one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", default="TinyImageNet", help="data module that it was trained on")
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--license", default=TERMS, help="licence note; {data} is the data module")
    parser.add_argument(
        "--history", default="", help="how training went where it was continued with another configuration"
    )
    options = parser.parse_args()
    try:
        stored = read_checkpoint(options.checkpoint)["gn_transfer"]["config"]["data"]["init_args"]
        data = getattr(data_modules, options.data)(
            options.data_root, img_size=stored["img_size"], batch_size=128, num_workers=0
        )
        path = release(options.checkpoint, data, options.output, options.license, options.history)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    card = json.loads(path.with_suffix(".json").read_text())
    print(f"{path}: {path.stat().st_size:,} bytes, val_acc1 {card['val_acc1']:.4f}, sha256 {card['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
