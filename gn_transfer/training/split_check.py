"""Splits are promises: no figure on images that were trained on, and no resumed run with another split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from gn_transfer.config import ConfigError
from gn_transfer.data import ImageDataModule
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.describe import test_images
from gn_transfer.data.duplicates import group_duplicates
from gn_transfer.data.splits import file_identities, find_copies
from gn_transfer.data.workers import core_count
from gn_transfer.training.checkpoint import read_checkpoint

Split = Mapping[str, Mapping[str, int]]
"""Size in bytes by path, for ``train`` and ``val``: what a checkpoint stores."""


def split_of_run(data: ImageDataModule) -> dict[str, dict[str, int]]:
    """List the images that a run trains and validates on.

    Args:
        data: The data, set up for fitting.
    """
    return {split: file_identities(Path(data.root), paths) for split, paths in data.split().items() if split != "test"}


def check_split(run_config: Mapping[str, Any], data: ImageDataModule, stage: str) -> list[str]:
    """Compare the images of this call with those that a checkpoint was trained and validated on.

    Args:
        run_config: What the checkpoint stores: ``config`` and ``split``.
        data: The data, set up for the stage.
        stage: ``fit`` (a resumed run), ``validate`` or ``test``.

    Returns:
        What to say about it, none where all is as it was.

    Raises:
        ConfigError: Images of training in the validation or test split, images of validation in the test split,
            another validation split of the same images, or a resumed run with other training images.
    """
    stored: Split | None = run_config.get("split")
    if not stored or "train" not in stored or "val" not in stored:
        return ["the checkpoint does not say which images it was trained on, so overlap cannot be ruled out"]
    part: Literal["val", "test"] = "test" if stage == "test" else "val"
    here = file_identities(Path(data.root), data.split()[part])
    trained, validated = (len(here.items() & stored[split].items()) for split in ("train", "val"))
    why = _differences(run_config.get("config", {}), data)
    if trained or (stage == "test" and validated):
        raise ConfigError(
            f"{trained:,} of the {len(here):,} {part} images are among the images that this run was trained on"
            + (f", and {validated:,} among those that it was validated on" if stage == "test" else "")
            + f", so the figure would flatter. {why}"
        )
    if stage == "test":
        return known_images(data, part, _root_of(run_config, data), stored["train"])
    if validated == len(here) == len(stored["val"]):
        if stage == "fit":
            _check_training_images(stored["train"], file_identities(Path(data.root), data.split()["train"]), why)
        return []
    if validated or stage == "fit":
        raise ConfigError(
            f"the validation images are other ones than those of the run: {len(here):,} here and "
            f"{len(stored['val']):,} there, {validated:,} of them the same. {why}"
        )
    found = known_images(data, part, _root_of(run_config, data), stored["train"])
    return found or ["other images than the run was validated on; none of them was trained on"]


def _check_training_images(stored: Mapping[str, int], here: Mapping[str, int], why: str) -> None:
    same = len(here.items() & stored.items())
    if not same == len(here) == len(stored):
        raise ConfigError(
            f"the training images are other ones than those of the run: {len(here):,} here and {len(stored):,} there, "
            f"{same:,} of them the same. {why} To train on other images, start a new run with "
            "model.pretrained=CHECKPOINT."
        )


def check_own_splits(data: ImageDataModule) -> list[str]:
    """Look for what spoils the validation of a run before it starts.

    Args:
        data: The data, set up for fitting.

    Returns:
        Warnings, a sentence each.
    """
    return known_images(data, "val", Path(data.root), data.split()["train"])


def about_source(pretrained: str | None, data: ImageDataModule) -> list[str]:
    """Say how many images of the run's validation and test its weights were trained on, where a checkpoint tells.

    Args:
        pretrained: ``model.pretrained``: a checkpoint of ours, or something else, which says nothing.
        data: The data, set up for fitting.

    Returns:
        A sentence for each split with such images.
    """
    if pretrained is None or not Path(pretrained).is_file() or Path(pretrained).suffix != ".ckpt":
        return []
    try:
        stored = read_checkpoint(pretrained)["gn_transfer"].get("split", {}).get("train", {})
    except ConfigError:  # weights of another program
        return []
    splits = {"validation": data.split()["val"], "test": [image.path for image in test_images(data)]}
    counts = {
        name: len(file_identities(Path(data.root), paths).items() & stored.items()) for name, paths in splits.items()
    }
    return [
        f"{count:,} of the {len(splits[name]):,} {name} images are among those that model.pretrained={pretrained} was "
        "trained on, so the figure is too high. Start from other weights, or hold these images out in a folder of "
        "their own."
        for name, count in counts.items()
        if count
    ]


def known_images(data: ImageDataModule, part: Literal["val", "test"], root: Path, trained: Iterable[str]) -> list[str]:
    """Say how many images of a split show what was trained on, under other names.

    Exact copies are looked for always. With ``data.group_duplicates`` near-duplicates are as well, where the split is a
    folder of the user's: of a split that we cut, they were kept out.

    Args:
        data: The data, with this split set up.
        part: The split.
        root: What the paths of the training images are relative to.
        trained: The training images.

    Returns:
        A sentence for the copies and one for the near-duplicates, where there are any.

    Raises:
        ConfigError: The folder of the images is no longer there.
    """
    here, trained = data.split()[part], list(trained)
    copies = find_copies(Path(data.root), here, root, trained)
    looked_for = data.group_duplicates and part in data.own_splits
    near = _near_duplicates(data, part, root, trained) if looked_for else {}
    near = {path: original for path, original in near.items() if path not in copies}
    return [
        f"{what} of training images among the {part} images: {len(found):,} of {len(here):,} "
        f"({next(iter(found))} {sign} {next(iter(found.values()))}), so the figure {is_too_high}. Remove them from "
        "one side; gn-transfer data check lists them."
        for found, what, sign, is_too_high in (
            (copies, "Exact copies", "=", "is too high"),
            (near, "Near-duplicates", "~", "may be too high"),
        )
        if found
    ]


def _near_duplicates(data: ImageDataModule, part: str, root: Path, trained: list[str]) -> dict[str, str]:
    """Find near-duplicates of training images; all images are decoded."""
    if root.resolve() != Path(data.root).resolve():
        return {}
    images = [LabeledImage(path, 0) for path in (*trained, *data.split()[part])]
    found: dict[str, str] = {}
    for group in group_duplicates(root, images, core_count()):
        if group[0] < len(trained):
            found |= {images[p].path: images[group[0]].path for p in group if p >= len(trained)}
    return found


def _root_of(run_config: Mapping[str, Any], data: ImageDataModule) -> Path:
    """Give the folder that a run was trained on; where that was moved, the folder of this call."""
    root = Path(str(run_config.get("config", {}).get("data", {}).get("init_args", {}).get("root")))
    return root if root.is_dir() else Path(data.root)


def _differences(config: Mapping[str, Any], data: ImageDataModule) -> str:
    """Say which options of the data differ from the run's."""
    theirs = {"seed_everything": config.get("seed_everything")}
    theirs |= {f"data.{key}": value for key, value in config.get("data", {}).get("init_args", {}).items()}
    of_data = ("root", "val_fraction", "test_fraction", "group_duplicates", "shots_per_class")
    keys = ("seed_everything", *(f"data.{name}" for name in of_data))
    different = []
    for key in keys:
        ours = data.seed if key == "seed_everything" else getattr(data, key.removeprefix("data."), None)
        if key in theirs and str(theirs[key]) != str(ours):
            different.append(f"{key} is {theirs[key]} in the run and {ours} here")
    if different:
        return f"{'; '.join(different)}. Leave these options out to take those of the run."
    return "The options are those of the run, so files were added, moved or changed since; restore them."
