"""``gn-transfer fit PATH``: what lies in a folder, and which options fit it. No torch is imported here."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from gn_transfer.config import STRIDE, ConfigError
from gn_transfer.report.runs import runs_on_images

TEST_FRACTION = 0.2
"""Share of the images that is held out for the test where the folder has no test images of its own."""

_SAMPLES = 4_000  # images to train on, with repetitions, for a small folder
_FEW = 200  # below this number of training images, an optimizer step takes half as many
_GROUPED = 5_000  # up to this number of images, all are decoded to find near-duplicates before the split
# Frozen BN bears a third of the learning rate of GN+WS, or less; a new head learns faster.
_OF_THE_PACKAGE = (
    *("--model.backbone", "tf_efficientnet_lite0", "--model.norm", "bn_frozen", "--data.img_size", "224"),
    *("--optimizer.lr", "0.0003", "--optimizer.head_lr", "0.003"),
)
_MEASURED = 200  # images whose size is read
_OXFORD = Path("annotations", "trainval.txt")


@dataclass(frozen=True)
class Recognized:
    """What lies in a folder.

    Attributes:
        options: Options of ``fit`` that stand in front of the user's own.
        remarks: What was found and chosen, and why, one line each.
    """

    options: list[str]
    remarks: list[str]


def recognize(path: Path, *, hub_answers: bool | None = None) -> Recognized:
    """Choose options for a folder of images.

    Args:
        path: Folder of the images: by class, or by split and class, or Oxford-IIIT Pet.
        hub_answers: Whether the Hugging Face hub can be reached; None asks.

    Returns:
        The options.

    Raises:
        ConfigError: No such folder, or none of these layouts.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; give the folder of your images.")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; give the folder of your images, with one folder per class in it.")
    for base in (path, path / "oxford-iiit-pet"):
        if (base / _OXFORD).is_file():
            remarks = [f"Oxford-IIIT Pet in {path}: the official trainval and test lists"]
            weights, why = _choose_weights(hub_answers)
            return Recognized(["--config", "pets_gnws.yaml", "--data.root", str(path), *weights], [*remarks, why])
    from gn_transfer.data.pair_layout import holds_pairs

    return _pairs(path, hub_answers) if holds_pairs(path) else _folder(path, hub_answers)


def _pairs(path: Path, hub_answers: bool | None) -> Recognized:
    """Choose options for images with masks."""
    from gn_transfer.data.layout import image_files
    from gn_transfer.data.pair_layout import find_pair_layout

    splits = find_pair_layout(path)
    images = len(image_files(splits["train"].images))
    options = ["--config", "segmentation_folder.yaml", "--data.root", str(path)]
    remarks = [f"images with masks in {path}: {images:,} images to train on"]
    more, held_out, images = _hold_out(splits, images)
    options += more
    if held_out:
        remarks.append(f"held out: {', '.join(held_out)}")
    if images <= _GROUPED:
        options += ["--data.group_duplicates", "true"]
    weights, why = _choose_weights(hub_answers)
    if "224" in weights:
        weights[weights.index("224")] = "256"
    why = why.replace("224 px", "256 px")
    found = image_files(splits["train"].images)[:_MEASURED]
    if (side := _middle_side(found)) < (64 if "64" in weights else 256):
        crop = max(64, side // STRIDE * STRIDE)
        weights += ["--data.img_size", str(crop)]  # the last one counts
        remarks.append(f"crops of {crop} px, since the short side of half of the images is at most {side} px")
    epochs = min(30, max(3, round(_SAMPLES / max(images, 1))))
    options += [*weights, "--trainer.max_epochs", str(epochs)]
    return Recognized(options, [*remarks, why, f"{epochs} epochs for about {images:,} images, effective batch 8"])


def _middle_side(images: Sequence[Path]) -> int:
    """Give the median of the short sides of images, in pixels; a large number where none can be read."""
    from gn_transfer.data.decode import BadImageError, read_size

    sides = []
    for image in images:
        with suppress(BadImageError):
            sides.append(min(read_size(image)))
    return int(median(sides)) if sides else 2**15


def _folder(path: Path, hub_answers: bool | None) -> Recognized:
    from gn_transfer.data.layout import find_layout, image_files

    layout = find_layout(path)
    images = sum(len(image_files(layout.splits["train"] / name)) for name in layout.classes)
    splits = ", ".join(f"{folder.name}/" for folder in layout.splits.values() if folder != path)
    found = f"{len(layout.classes)} classes, {images:,} images" + (f" to train on; splits {splits}" if splits else "")
    options, remarks = ["--config", "folder.yaml", "--data.root", str(path)], [f"images by class in {path}: {found}"]
    more, held_out, images = _hold_out(layout.splits, images)
    options += more
    if held_out:
        remarks.append(f"held out, stratified by class: {', '.join(held_out)}")
        if images <= _GROUPED:
            remarks[-1] += "; images that show the same stay on one side"
    if images <= _GROUPED:
        options += ["--data.group_duplicates", "true"]
    weights, why = _choose_weights(hub_answers)
    epochs = min(30, max(3, round(_SAMPLES / max(images, 1))))
    batch = 16 if images >= _FEW else 8
    options += [*weights, "--trainer.max_epochs", str(epochs), "--accumulation.effective_batch_size", str(batch)]
    return Recognized(
        options, [*remarks, why, f"{epochs} epochs and effective batch {batch} for about {images:,} images"]
    )


def _hold_out(splits: Collection[str | None], images: int) -> tuple[list[str], list[str], int]:
    """Choose what is held out where there are no folders for it: options, what to say, the images that are left."""
    options, held_out = [], []
    if "test" not in splits:
        options = ["--data.test_fraction", f"{TEST_FRACTION:g}"]
        held_out.append(f"{TEST_FRACTION:.0%} for the test")
        images = round(images * (1 - TEST_FRACTION))
    if "val" not in splits:
        held_out.append("20% of the rest for validation" if held_out else "20% for validation")
        images = round(images * 0.8)
    return options, held_out, images


def _choose_weights(hub_answers: bool | None) -> tuple[list[str], str]:
    """Choose pretrained weights that can be had, and say why."""
    from gn_transfer.backbones import hub
    from gn_transfer.backbones.packages import find_file
    from gn_transfer.backbones.pretrained import resolve_pretrained

    large = resolve_pretrained("resnetv2_50", "gn_ws", "auto")
    assert large is not None
    assert large.repository is not None
    cached = hub.in_cache(large.repository)
    if cached or (hub.answers() if hub_answers is None else hub_answers):
        place = "in the cache of the Hugging Face hub" if cached else "90 MB from the Hugging Face hub"
        return [], f"ResNetV2-50 with GN+WS at 224 px, pretrained on ImageNet-21k ({place})"
    if find_file("tf_efficientnet_lite0") is not None:
        return list(_OF_THE_PACKAGE), (
            "EfficientNet-Lite0 with frozen BN at 224 px, pretrained on ImageNet-1k (from the package of "
            "gn-transfer[imagenet]), because the Hugging Face hub does not answer"
        )
    options = ["--model.backbone", "resnetv2_18", "--data.img_size", "64", "--optimizer.lr", "0.01"]
    return options, (
        "ResNetV2-18 with GN+WS at 64 px, the small weights that come with gn-transfer (Tiny-ImageNet), because the "
        "Hugging Face hub does not answer; far better: a network, or pip install 'gn-transfer[imagenet]'"
    )


def run_name(path: Path) -> str:
    """Name a folder of runs after a folder of images.

    Example:
        >>> run_name(Path("/data/my photos"))
        'my_photos'
    """
    return re.sub(r"[^\w.-]+", "_", path.resolve().name).strip("._") or "images"


def find_checkpoint(path: Path, root: Path) -> Path:
    """Find the checkpoint that ``test PATH`` or ``validate PATH`` means.

    Args:
        path: A checkpoint, a run's folder under ``runs/`` or ``checkpoints/``, or the folder of images that a run was
            trained on; then the newest such run counts.
        root: Folder that contains ``runs/`` and ``checkpoints/``.

    Raises:
        ConfigError: None of these.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder; give a checkpoint, a run's folder, or a folder of images.")
    for folder in (path, root / "checkpoints" / path.parent.name / path.name):
        if (folder / "best.ckpt").is_file():
            return folder / "best.ckpt"
    for run in runs_on_images(path, root):
        best = root / "checkpoints" / run.parent.name / run.name / "best.ckpt"
        if best.is_file():
            return best
    raise ConfigError(f"no run under {root / 'runs'} was trained on {path}; train one: gn-transfer fit {path}")


def leading_path(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Take a path that stands in front of the options.

    Example:
        >>> leading_path(["photos", "--model.norm", "gn"])
        (PosixPath('photos'), ['--model.norm', 'gn'])
    """
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), list(arguments[1:])
    return None, list(arguments)
