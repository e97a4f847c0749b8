"""Splits are promises: no figure on images that were trained on, and no resumed run with another split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gn_transfer.config import ConfigError
from gn_transfer.data import ImageDataModule
from gn_transfer.data.splits import file_identities

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
        ConfigError: Images of training in the validation or test split, images of validation in the test split, or
            another validation split of the same images.
    """
    stored: Split | None = run_config.get("split")
    if not stored or "train" not in stored or "val" not in stored:
        return ["the checkpoint does not say which images it was trained on, so overlap cannot be ruled out"]
    part = "test" if stage == "test" else "val"
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
        return []
    if validated == len(here) == len(stored["val"]):
        return []
    if validated or stage == "fit":
        raise ConfigError(
            f"the validation images are other ones than those of the run: {len(here):,} here and "
            f"{len(stored['val']):,} there, {validated:,} of them the same. {why}"
        )
    return ["other images than the run was validated on; none of them was trained on"]


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
