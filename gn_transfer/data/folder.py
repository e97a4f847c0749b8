"""The user's own images: a folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ImageDataModule, ListedImages
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import SUFFIXES
from gn_transfer.data.splits import stratified_split

_VAL_NAMES = ("val", "valid", "validation")


class Folder(ImageDataModule):
    """Images of your own, one folder per class.

    Either ``root/train/<class>/*``, with ``root/val`` and ``root/test`` of the same classes where they exist, or
    ``root/<class>/*``. A missing validation or test split is cut from the rest, stratified by class.

    Args:
        root: Folder of the class folders, or of train, val and test.
        val_fraction: Share of the training images that is held out for validation, stratified by class; not used
            where there is a folder val, valid or validation.
        test_fraction: Share of the images that is held out for ``test`` before validation is; 0 disables. The same
            images for every seed. Not used where there is a folder test.
        **options: Those of :class:`gn_transfer.data.ImageDataModule`.
    """

    def __init__(self, root: Path | str, val_fraction: float = 0.2, test_fraction: float = 0.0, **options: Any) -> None:
        super().__init__(root, val_fraction=val_fraction, **options)
        self.test_fraction = test_fraction

    def list_fit(self) -> ListedImages:
        """List training and, where it has a folder, validation."""
        train_root = self._train_root()
        classes = class_folders(train_root)
        train = self._images(train_root, classes)
        if self._split_folder("test") is None and self.test_fraction != 0.0:
            train = self._cut_test(train)[0]
        val_root = self._split_folder(*_VAL_NAMES)
        return ListedImages(classes, train, None if val_root is None else self._same_classes(val_root, classes))

    def list_test(self) -> list[LabeledImage]:
        """List the folder ``test``, or the part that ``test_fraction`` holds out."""
        train_root = self._train_root()
        classes = class_folders(train_root)
        test_root = self._split_folder("test")
        if test_root is not None:
            return self._same_classes(test_root, classes)
        if self.test_fraction == 0.0:
            raise ConfigError(
                f"data.root={self.root}: no test images. Put the class folders into {Path(self.root) / 'train'} and "
                f"those of the test images into {Path(self.root) / 'test'}, or hold a fraction out: train with "
                "data.test_fraction."
            )
        return self._cut_test(self._images(train_root, classes))[1]

    def _train_root(self) -> Path:
        root = Path(self.root)
        if not root.is_dir():
            raise ConfigError(f"data.root={self.root}: no such folder; give the folder of your class folders.")
        train = self._split_folder("train")
        splits = [name for name in ("test", *_VAL_NAMES) if _has_folders(root / name)]
        if train is None and splits:
            raise ConfigError(
                f"data.root={self.root}: {root / splits[0]} holds class folders, but there is no {root / 'train'}; "
                "move the class folders of the training images into it."
            )
        return train or root

    def _split_folder(self, *names: str) -> Path | None:
        """Find the folder of a split. A folder without subfolders is a class that happens to be called train."""
        if not _has_folders(Path(self.root) / "train"):
            return None
        found = [Path(self.root) / name for name in names if (Path(self.root) / name).is_dir()]
        if len(found) > 1:
            raise ConfigError(f"data.root={self.root}: {' and '.join(path.name for path in found)}; keep one of them.")
        return found[0] if found else None

    def _images(self, split_root: Path, classes: list[str]) -> list[LabeledImage]:
        images = []
        for target, name in enumerate(classes):
            found = image_files(split_root / name)
            if not found:
                raise ConfigError(
                    f"{split_root / name}: no images ({', '.join(sorted(SUFFIXES))}); add some or remove the folder."
                )
            images += [LabeledImage(path.relative_to(Path(self.root)).as_posix(), target) for path in found]
        return images

    def _same_classes(self, split_root: Path, classes: list[str]) -> list[LabeledImage]:
        found = class_folders(split_root)
        if found != classes:
            lacks, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
            raise ConfigError(
                f"{split_root}: its class folders are not those of train"
                + (f"; missing: {', '.join(lacks)}" if lacks else "")
                + (f"; not in train: {', '.join(extra)}" if extra else "")
                + "."
            )
        return self._images(split_root, classes)

    def _cut_test(self, images: list[LabeledImage]) -> tuple[list[LabeledImage], list[LabeledImage]]:
        rest, test = stratified_split(
            [image.path for image in images],
            [image.target for image in images],
            self.test_fraction,
            seed=0,  # one test split for every run: no seed may train on images that another seed tests on
            key="data.test_fraction",
        )
        return [images[position] for position in rest], [images[position] for position in test]


def class_folders(root: Path) -> list[str]:
    """List the classes: the names of the folders in ``root``, sorted; hidden ones are left out.

    Raises:
        ConfigError: Fewer than two.
    """
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        found = f"only one class folder ({names[0]})" if names else "no class folders"
        raise ConfigError(
            f"{root}: {found}. A classifier needs at least 2 classes: one folder per class with its images in it."
        )
    return names


def image_files(folder: Path) -> list[Path]:
    """List the image files in and below a folder, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())
