"""The user's own images with masks: a folder of images and a folder of masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ListedImages
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.hold_out import hold_out
from gn_transfer.data.layout import image_files
from gn_transfer.data.masks import IGNORED, MaskValues, values_in
from gn_transfer.data.pair_layout import PairFolders, find_pair_layout
from gn_transfer.data.segmentation import SegmentationDataModule

CLASSES = "classes.txt"
"""File with the names of the classes, one a line: the first line is the value 0 of a mask."""

_FEW = 20  # masks that are looked at for a message


class SegmentationFolder(SegmentationDataModule):
    """Images and masks of your own: ``root/images`` and ``root/masks``, paired by name, with ``root/classes.txt``.

    With splits of your own, ``root/train``, ``root/val`` and ``root/test`` hold such folders each, or ``root/images``
    and ``root/masks`` hold folders ``train``, ``val`` and ``test`` (in any case, and under the names of
    :data:`gn_transfer.data.layout.SPLITS`). A missing validation or test split is cut from the rest; validation so that
    it has its share of the masks with rare classes.

    A mask is an 8-bit grey or palette PNG of the size of its image. The value of a pixel is the line of its class in
    ``classes.txt``, from 0.

    Args:
        root: The folder.
        val_fraction: Share of the training images that is held out for validation; not used where there is a folder
            val.
        test_fraction: Share of the images that is held out for ``test`` before validation is; 0 disables. The same
            images for every seed. Not used where there is a folder test.
        ignore_index: Value of pixels that do not count; null: all values are classes. If it is the value of a line of
            ``classes.txt``, that line is no class, and the numbers of the classes behind it fall by one.
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

    @property
    def own_splits(self) -> Collection[str]:
        """Splits that are folders."""
        return find_pair_layout(Path(self.root))

    def mask_values(self) -> MaskValues:
        """Read ``classes.txt``."""
        names = self._class_names()
        ignored = frozenset() if self.ignore_index is None else frozenset({self.ignore_index})
        values = [value for value in range(len(names)) if value not in ignored]
        if len(values) < 2:
            raise ConfigError(
                f"data.ignore_index={self.ignore_index} leaves {len(values)} class of {Path(self.root) / CLASSES}, and "
                "a segmentation needs at least 2."
            )
        classes = tuple(names[value] for value in values)
        return MaskValues(classes, {value: target for target, value in enumerate(values)}, ignored)

    def list_fit(self) -> ListedImages:
        """List training and, where it has a folder, validation."""
        splits = find_pair_layout(Path(self.root))
        train = self._pairs(splits["train"])
        if "test" not in splits and self.test_fraction != 0.0:
            train = self._cut_test(train)[0]
        classes = list(self.mask_values().classes)
        return ListedImages(classes, train, self._pairs(splits["val"]) if "val" in splits else None)

    def list_test(self) -> list[LabeledImage]:
        """List the folder ``test``, or the part that ``test_fraction`` holds out."""
        splits = find_pair_layout(Path(self.root))
        if "test" in splits:
            return self._pairs(splits["test"])
        if self.test_fraction == 0.0:
            raise ConfigError(
                f"data.root={self.root}: no test images. Put images and masks into {Path(self.root) / 'test'}, or hold "
                "a fraction out: train with data.test_fraction."
            )
        return self._cut_test(self._pairs(splits["train"]))[1]

    def _without_bad_images(self, images: list[LabeledImage]) -> list[LabeledImage]:
        """Group the images by the rarest class in their masks, by which validation is stratified."""
        good = super()._without_bad_images(images)
        rarest_first = np.argsort(self.pixel_counts(good), kind="stable")
        targets = []
        for image in good:
            there = self.pixel_counts([image])[rarest_first] > 0
            targets.append(int(rarest_first[there.argmax()]) if there.any() else 0)
        sizes = Counter(targets)
        common = sizes.most_common(1)[0][0] if sizes else 0
        return [
            image._replace(target=target if sizes[target] > 1 else common)
            for image, target in zip(good, targets, strict=True)
        ]

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
        root = Path(self.root)
        found = values_in(root, self._pairs(find_pair_layout(root)["train"])[:_FEW])
        return f" The first masks hold the values {', '.join(map(str, sorted(found)))}." if found else ""

    def _pairs(self, split: PairFolders) -> list[LabeledImage]:
        images, masks = _by_stem(split.images), _by_stem(split.masks)
        if not images:
            raise ConfigError(f"{split.images}: no images; put the images of the masks in {split.masks} there.")
        if set(images) != set(masks):
            raise ConfigError(_mismatch(images, masks, split))
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


def _mismatch(images: Mapping[str, Path], masks: Mapping[str, Path], split: PairFolders) -> str:
    """Say which files have no partner, and which naming would explain it."""
    alone, without = sorted(set(images) - set(masks)), sorted(set(masks) - set(images))
    parts = []
    if alone:
        parts.append(f"{len(alone):,} images have no mask ({images[alone[0]]})")
    if without:
        parts.append(f"{len(without):,} masks have no image ({masks[without[0]]})")
    hint = f" Give each mask in {split.masks} the name of its image in {split.images}, whatever its ending."
    if alone and without:
        for mask in without:
            image = max((stem for stem in alone if mask.startswith(stem) or mask.endswith(stem)), key=len, default=None)
            if image is not None:
                extra = mask.replace(image, "", 1)
                hint += f" All may be well but for {extra!r} in the names of the masks: remove it."
                break
    return f"{split.images.parent}: {' and '.join(parts)}.{hint}"
