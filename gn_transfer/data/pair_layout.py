"""How a folder of images with masks is arranged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gn_transfer.config import ConfigError
from gn_transfer.data.layout import refuse_misspelled_splits, split_folders, split_of, subfolders

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
"""Names of the folder of images whose pixels are classified, in any case."""

MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "segmentation")
"""Names of the folder of their masks, in any case."""


class PairFolders(NamedTuple):
    """Where the images of a split and their masks lie."""

    images: Path
    masks: Path


def find_pair_layout(root: Path) -> dict[str, PairFolders]:
    """Recognize how a folder of images with masks is arranged.

    One of ``root/images`` and ``root/masks``; ``root/<split>/images`` and ``root/<split>/masks``;
    ``root/images/<split>`` and ``root/masks/<split>``. Splits have the names of
    :data:`gn_transfer.data.layout.SPLITS`, in any case.

    Args:
        root: The folder.

    Returns:
        The folders of each split. Without splits, those of ``train`` alone.

    Raises:
        ConfigError: No such folders, or ones that can be read in two ways.
    """
    if not root.is_dir():
        raise ConfigError(f"data.root={root}: no such folder; give the folder of images and masks.")
    folders = subfolders(root)
    splits, beside = split_folders(root, folders)
    if _named(folders, IMAGE_FOLDERS) is None:
        refuse_misspelled_splits(root, [folder for folder in beside if _holds_both(folder)], "images and masks")
        _require_train(root, splits, folders)
        return {split: _pair_in(folder) for split, folder in splits.items()}
    pair = _pair_in(root)
    if splits:
        other = next(iter(splits.values()))
        raise ConfigError(
            f"data.root={root}: {pair.images.name} and {other.name} stand beside each other, so it is unclear which "
            f"images are for training. Move {pair.images.name} and {pair.masks.name} into {root / 'train'}, or "
            f"{other.name} out of {root}."
        )
    return _splits_inside(root, pair)


def holds_pairs(root: Path) -> bool:
    """Say whether a folder, or its split for training, holds images with masks rather than images by class."""
    folders = subfolders(root)
    train = next((folder for folder in folders if split_of(folder.name) == "train"), None)
    return _holds_both(root) or (train is not None and _holds_both(train))


def _holds_both(folder: Path) -> bool:
    folders = subfolders(folder)
    return _named(folders, IMAGE_FOLDERS) is not None and _named(folders, MASK_FOLDERS) is not None


def _pair_in(folder: Path) -> PairFolders:
    folders = subfolders(folder)
    images, masks = _named(folders, IMAGE_FOLDERS), _named(folders, MASK_FOLDERS)
    if images is None or masks is None:
        lacks = "images" if images is None else "masks"
        raise ConfigError(f"{folder}: no folder {lacks}; put images into images and their masks into masks.")
    return PairFolders(images, masks)


def _splits_inside(root: Path, pair: PairFolders) -> dict[str, PairFolders]:
    """Look for splits below the folders of images and masks."""
    inside = subfolders(pair.images)
    splits, beside = split_folders(pair.images, inside)
    if not splits:
        return {"train": pair}
    if beside:
        raise ConfigError(
            f"{pair.images}: {beside[0].name} stands beside the split {next(iter(splits.values())).name}; move it into "
            f"a split, or rename the folders so that none has the name of a split ({', '.join(splits)})."
        )
    _require_train(root, splits, inside)
    of_masks, _ = split_folders(pair.masks, subfolders(pair.masks))
    for split, folder in splits.items():
        if split not in of_masks:
            raise ConfigError(f"{pair.masks}: no folder {folder.name}, which {folder} needs; put its masks there.")
    return {split: PairFolders(folder, of_masks[split]) for split, folder in splits.items()}


def _require_train(root: Path, splits: dict[str, Path], folders: Sequence[Path]) -> None:
    if "train" not in splits:
        there = ", ".join(folder.name for folder in folders[:5]) or "no folders"
        raise ConfigError(
            f"data.root={root}: no folder images (with masks beside it) and no folder train; there: {there}. Put "
            f"the images into {root / 'images'} and their masks, under the same names, into {root / 'masks'}."
        )


def _named(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """Find the first folder that has one of some names, in any case."""
    return next((folder for name in names for folder in folders if folder.name.lower() == name), None)
