"""Tiny-ImageNet: 200 classes of ImageNet at 64 x 64 pixels, what the released backbones are trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ImageDataModule, ListedImages
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.files import read_text

FOLDER = "tiny-imagenet-200"
"""Name of the data set's folder inside its archive."""


class TinyImageNet(ImageDataModule):
    """Tiny-ImageNet (Stanford CS231n): 500 training and 50 validation images of each of 200 classes, 64 px.

    Its own layout is read: ``wnids.txt``, ``words.txt``, ``train/<wnid>/images/*.JPEG``, ``val/images/*.JPEG`` and
    ``val/val_annotations.txt``. Targets follow the order of ``wnids.txt``. The labels of its test images were never
    published, so there is no test split.

    Args:
        root: Folder that holds ``tiny-imagenet-200``, or that folder itself.
        img_size: Side of the square that the model sees, in pixels.
        val_fraction: Not used: the data set has a validation split of its own.
        **options: Those of :class:`gn_transfer.data.ImageDataModule`.
    """

    def __init__(
        self, root: Path | str = "data", img_size: int = 64, val_fraction: float = 0.2, **options: Any
    ) -> None:
        super().__init__(root, img_size=img_size, val_fraction=val_fraction, **options)

    def list_fit(self) -> ListedImages:
        """List ``train/<wnid>/images`` and what ``val/val_annotations.txt`` names."""
        base = self._base()
        wnids = read_wnids(base / "wnids.txt")
        targets = {wnid: target for target, wnid in enumerate(wnids)}
        inside = base.relative_to(Path(self.root))
        train = []
        for wnid, target in targets.items():
            folder = base / "train" / wnid / "images"
            names = sorted(path.name for path in folder.glob("*.JPEG"))
            if not names:
                raise ConfigError(f"{folder}: no *.JPEG there; unpack the archive of Tiny-ImageNet again.")
            train += [LabeledImage((inside / "train" / wnid / "images" / name).as_posix(), target) for name in names]
        val = [
            LabeledImage((inside / "val" / "images" / name).as_posix(), targets[wnid])
            for name, wnid in read_val_annotations(base / "val" / "val_annotations.txt", wnids)
        ]
        return ListedImages(class_names(wnids, base / "words.txt"), train, val)

    def list_test(self) -> list[LabeledImage]:
        """Refuse: the labels of the test images are not published."""
        raise ConfigError(
            "TinyImageNet has no labelled test images; use gn-transfer validate, which reads its 10,000 validation "
            "images."
        )

    def _base(self) -> Path:
        root = Path(self.root)
        for base in (root / FOLDER, root):
            if (base / "wnids.txt").is_file():
                return base
        raise ConfigError(
            f"data.root={self.root}: no Tiny-ImageNet there. Unpack tiny-imagenet-200.zip "
            f"(http://cs231n.stanford.edu/tiny-imagenet-200.zip, 240 MB) so that {root / FOLDER / 'wnids.txt'} exists."
        )


def read_wnids(path: Path) -> list[str]:
    """Read ``wnids.txt``: one WordNet id per line, in the order of the targets.

    Raises:
        ConfigError: Fewer than two ids, or one twice.
    """
    wnids = _read(path).split()
    doubles = [wnid for wnid, count in Counter(wnids).items() if count > 1]
    if len(wnids) < 2 or doubles:
        raise ConfigError(f"{path}: {f'{doubles[0]} stands there twice' if doubles else 'fewer than two ids'}.")
    return wnids


def read_val_annotations(path: Path, wnids: list[str]) -> list[tuple[str, str]]:
    """Read ``val_annotations.txt``: lines of file name, WordNet id and a box, separated by tabs.

    Args:
        path: The file.
        wnids: The ids that may occur.

    Returns:
        File name and id per line.

    Raises:
        ConfigError: A line is not of that form, or its id is not one of ``wnids``.
    """
    known = set(wnids)
    images = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not name or wnid not in known or "/" in name:
            raise ConfigError(f"{path}:{number}: {line!r} is not a line of file name, id of wnids.txt and box.")
        images.append((name, wnid))
    if not images:
        raise ConfigError(f"{path} is empty; unpack the archive of Tiny-ImageNet again.")
    return images


def class_names(wnids: list[str], words: Path) -> list[str]:
    """Name classes by the first of their synonyms in ``words.txt``; where two share it, with the id behind it.

    Args:
        wnids: WordNet ids.
        words: Lines of id and synonyms; without that file the ids are the names.

    Returns:
        One name per id, all different.
    """
    if not words.is_file():
        return list(wnids)
    synonyms = dict(line.split("\t", 1) for line in _read(words).splitlines() if "\t" in line)
    names = [synonyms.get(wnid, wnid).partition(",")[0].strip() for wnid in wnids]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
