"""The user's own images with masks: a folder of images and a folder of masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ListedImages
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import BadImageError, decode_mask
from gn_transfer.data.hold_out import hold_out
from gn_transfer.data.layout import IMAGE_FOLDERS, MASK_FOLDERS, image_files, named_folder, split_of, subfolders
from gn_transfer.data.masks import IGNORED, MaskValues
from gn_transfer.data.segmentation import SegmentationDataModule

CLASSES = "classes.txt"
"""File with the names of the classes, one a line: the first line is the value 0 of a mask."""

_FEW = 20  # masks that are looked at for a message


class SegmentationFolder(SegmentationDataModule):
    """Images and masks of your own: ``root/images`` and ``root/masks``, paired by name, with ``root/classes.txt``.

    With splits of your own, ``root/train``, ``root/val`` and ``root/test`` hold such folders each (in any case, and
    under the names of :data:`gn_transfer.data.layout.SPLITS`). A missing validation or test split is cut from the rest.

    A mask is an 8-bit grey or palette PNG of the size of its image. The value of a pixel is the line of its class in
    ``classes.txt``, from 0.

    Args:
        root: The folder.
        val_fraction: Share of the training images that is held out for validation; not used where there is a folder
            val.
        test_fraction: Share of the images that is held out for ``test`` before validation is; 0 disables. The same
            images for every seed. Not used where there is a folder test.
        ignore_index: Value of pixels that do not count; null: all values are classes.
        **options: Those of :class:`gn_transfer.data.SegmentationDataModule`.
    """

    def __init__(
        self,
        root: Path | str,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        ignore_index: int | None = IGNORED,
        **options: Any,
    ) -> None:
        super().__init__(root, val_fraction=val_fraction, **options)
        if ignore_index is not None and not 0 <= ignore_index <= 255:
            raise ConfigError(f"data.ignore_index={ignore_index} is no value of a mask; give 0 to 255, or null.")
        self.test_fraction = test_fraction
        self.ignore_index = ignore_index

    def mask_values(self) -> MaskValues:
        """Read ``classes.txt``."""
        names = self._class_names()
        ignored = frozenset() if self.ignore_index is None else frozenset({self.ignore_index})
        targets = {value: value for value in range(len(names)) if value not in ignored}
        return MaskValues(tuple(names), targets, ignored)

    def list_fit(self) -> ListedImages:
        """List training and, where it has a folder, validation."""
        splits = self._splits()
        train = self._pairs(splits["train"])
        if "test" not in splits and self.test_fraction != 0.0:
            train = self._cut_test(train)[0]
        return ListedImages(self._class_names(), train, self._pairs(splits["val"]) if "val" in splits else None)

    def list_test(self) -> list[LabeledImage]:
        """List the folder ``test``, or the part that ``test_fraction`` holds out."""
        splits = self._splits()
        if "test" in splits:
            return self._pairs(splits["test"])
        if self.test_fraction == 0.0:
            raise ConfigError(
                f"data.root={self.root}: no test images. Put images and masks into {Path(self.root) / 'test'}, or hold "
                "a fraction out: train with data.test_fraction."
            )
        return self._cut_test(self._pairs(splits["train"]))[1]

    def _class_names(self) -> list[str]:
        path = Path(self.root) / CLASSES
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file. Write the names of the classes into it, one a line; the first line names the "
                f"value 0 of a mask.{self._values_found()}"
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); save it as UTF-8 text.") from error
        names = [line.strip() for line in lines]
        while names and not names[-1]:
            names.pop()
        if len(names) < 2:
            raise ConfigError(f"{path}: names {len(names)} classes, and a segmentation needs at least 2.")
        if len(names) > 254:
            raise ConfigError(f"{path}: names {len(names)} classes; a mask of 8 bits holds at most 254.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            shown = ", ".join(name or "an empty line" for name in twice)
            raise ConfigError(f"{path}: {shown} occurs twice; give every line a name of its own.")
        return names

    def _values_found(self) -> str:
        """Say which values the first masks hold."""
        found: set[int] = set()
        for image in self._pairs(self._splits()["train"])[:_FEW]:
            try:
                found |= set(np.unique(decode_mask(Path(self.root) / image.mask)).tolist())
            except BadImageError:
                continue
        return f" The first masks hold the values {', '.join(map(str, sorted(found)))}." if found else ""

    def _splits(self) -> Mapping[str, Path]:
        root = Path(self.root)
        if not root.is_dir():
            raise ConfigError(f"data.root={root}: no such folder; give the folder of images and masks.")
        folders = subfolders(root)
        if named_folder(folders, IMAGE_FOLDERS):
            return {"train": root}
        splits: dict[str, Path] = {}
        for folder in folders:
            split = split_of(folder.name)
            if split in splits:
                raise ConfigError(f"data.root={root}: {splits[split].name} and {folder.name}; keep one of them.")
            if split is not None:
                splits[split] = folder
        if "train" not in splits:
            there = ", ".join(folder.name for folder in folders[:5]) or "no folders"
            raise ConfigError(
                f"data.root={root}: no folder images (with masks beside it) and no folder train; there: {there}. Put "
                f"the images into {root / 'images'} and their masks, under the same names, into {root / 'masks'}."
            )
        return splits

    def _pairs(self, split: Path) -> list[LabeledImage]:
        folders = subfolders(split)
        of_images, of_masks = named_folder(folders, IMAGE_FOLDERS), named_folder(folders, MASK_FOLDERS)
        if of_images is None or of_masks is None:
            lacks = "images" if of_images is None else "masks"
            raise ConfigError(f"{split}: no folder {lacks}; put images into images and their masks into masks.")
        images, masks = _by_stem(of_images), _by_stem(of_masks)
        if not images:
            raise ConfigError(f"{of_images}: no images; put the images of the masks in {of_masks.name} there.")
        if set(images) != set(masks):
            raise ConfigError(_mismatch(images, masks, of_images, of_masks))
        root = Path(self.root)
        return [
            LabeledImage(path.relative_to(root).as_posix(), 0, masks[stem].relative_to(root).as_posix())
            for stem, path in images.items()
        ]

    def _cut_test(self, images: list[LabeledImage]) -> tuple[list[LabeledImage], list[LabeledImage]]:
        # One test split for every run: no seed may train on images that another seed tests on.
        root = Path(self.root) if self.group_duplicates else None
        return hold_out(images, self.test_fraction, seed=0, key="data.test_fraction", root=root)


def _by_stem(folder: Path) -> dict[str, Path]:
    """Files by their path below the folder, without the ending."""
    found: dict[str, Path] = {}
    for path in image_files(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise ConfigError(f"{path} and {found[stem].name} differ in their ending only; keep one of them.")
        found[stem] = path
    return found


def _mismatch(images: Mapping[str, Path], masks: Mapping[str, Path], of_images: Path, of_masks: Path) -> str:
    """Say which files have no partner, and which naming would explain it."""
    alone, without = sorted(set(images) - set(masks)), sorted(set(masks) - set(images))
    parts = []
    if alone:
        parts.append(f"{len(alone):,} images have no mask ({images[alone[0]]})")
    if without:
        parts.append(f"{len(without):,} masks have no image ({masks[without[0]]})")
    hint = f" Give each mask in {of_masks} the name of its image in {of_images}, whatever its ending."
    if alone and without:
        for mask in without:
            image = max((stem for stem in alone if mask.startswith(stem) or mask.endswith(stem)), key=len, default=None)
            if image is not None:
                extra = mask.replace(image, "", 1)
                hint += f" All may be well but for {extra!r} in the names of the masks: remove it."
                break
    return f"{of_images.parent}: {' and '.join(parts)}.{hint}"
