"""The user's own images: a folder per class."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ImageDataModule, ListedImages
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import SUFFIXES
from gn_transfer.data.hold_out import hold_out
from gn_transfer.data.layout import (
    FileCount,
    Layout,
    count_files,
    describe_ignored,
    find_layout,
    image_files,
    subfolders,
)


class Folder(ImageDataModule):
    """Images of your own, one folder per class.

    Either ``root/train/<class>/*``, with ``root/val`` and ``root/test`` of the same classes where they exist (in any
    case, and under the names of :data:`gn_transfer.data.layout.SPLITS`), or ``root/<class>/*``. A missing validation
    or test split is cut from the rest, stratified by class.

    Args:
        root: Folder of the class folders, or of train, val and test.
        val_fraction: Share of the training images that is held out for validation, stratified by class; not used
            where there is a folder val.
        test_fraction: Share of the images that is held out for ``test`` before validation is; 0 disables. The same
            images for every seed. Not used where there is a folder test.
        **options: Those of :class:`gn_transfer.data.ImageDataModule`.
    """

    def __init__(self, root: Path | str, val_fraction: float = 0.2, test_fraction: float = 0.0, **options: Any) -> None:
        super().__init__(root, val_fraction=val_fraction, **options)
        self.test_fraction = test_fraction

    @property
    def layout(self) -> Layout:
        """How the folder is arranged; looked at anew each time."""
        return find_layout(Path(self.root))

    @property
    def own_splits(self) -> Collection[str]:
        """Splits that are folders."""
        return self.layout.splits

    def list_fit(self) -> ListedImages:
        """List training and, where it has a folder, validation."""
        layout = self.layout
        train = self._images(layout.splits["train"], layout.classes)
        if "test" not in layout.splits and self.test_fraction != 0.0:
            train = self._cut_test(train)[0]
        return ListedImages(layout.classes, train, self._listed(layout, "val") if "val" in layout.splits else None)

    def list_test(self) -> list[LabeledImage]:
        """List the folder ``test``, or the part that ``test_fraction`` holds out."""
        layout = self.layout
        if "test" in layout.splits:
            return self._listed(layout, "test")
        if self.test_fraction == 0.0:
            raise ConfigError(
                f"data.root={self.root}: no test images. Put the class folders into {Path(self.root) / 'train'} and "
                f"those of the test images into {Path(self.root) / 'test'}, or hold a fraction out: train with "
                "data.test_fraction."
            )
        return self._cut_test(self._images(layout.splits["train"], layout.classes))[1]

    def count_files(self) -> FileCount:
        """Say what became of every file below the root."""
        return count_files(self.layout)

    def _images(self, split_root: Path, classes: list[str]) -> list[LabeledImage]:
        images = []
        skip = len((Path(self.root) / "x").as_posix()) - 1
        for target, name in enumerate(classes):
            found = image_files(split_root / name)
            if not found:
                raise ConfigError(
                    f"{split_root / name}: no images ({', '.join(sorted(SUFFIXES))}); there: "
                    f"{describe_ignored(split_root / name) or 'it is empty'}. Add images or remove the folder."
                )
            images += [LabeledImage(path.as_posix()[skip:], target) for path in found]
        return images

    def _listed(self, layout: Layout, split: str) -> list[LabeledImage]:
        folder, classes = layout.splits[split], layout.classes
        found = [path.name for path in subfolders(folder)]
        if found != classes:
            lacks, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
            raise ConfigError(
                f"{folder}: its class folders are not those of {layout.splits['train'].name}"
                + (f"; missing: {', '.join(lacks)}" if lacks else "")
                + (f"; not in {layout.splits['train'].name}: {', '.join(extra)}" if extra else "")
                + ". Give every split the same class folders."
            )
        return self._images(folder, classes)

    def _cut_test(self, images: list[LabeledImage]) -> tuple[list[LabeledImage], list[LabeledImage]]:
        # One test split for every run: no seed may train on images that another seed tests on.
        root = Path(self.root) if self.group_duplicates else None
        return hold_out(images, self.test_fraction, seed=0, key="data.test_fraction", root=root)
