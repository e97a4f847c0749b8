"""Handwritten digits: those embedded in scikit-learn, or MNIST; written to files once, then read like any folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.config import ConfigError
from gn_transfer.data.augmentation import Recipe
from gn_transfer.data.folder import Folder
from gn_transfer.data.splits import stratified_split

DigitSource = Literal["sklearn", "mnist"]

CANVAS = 32
"""Side of a file in pixels: evaluation cuts 87.5 % out of the centre, which leaves MNIST's own 28."""

_STAMP = "digits.json"
_VERSION = 1
_TEST_SHARE = 1 / 6  # MNIST's own: 10,000 of 70,000 and a little more


class Digits(Folder):
    """Handwritten digits, grey, 28 px: scikit-learn's 1,797 (8 px, magnified), or MNIST's 70,000.

    They are written to ``root/<source>/{train,test}/<digit>/*.png`` on first use. A model that takes one channel
    (``cnn_mnist``) gets one.

    Args:
        root: Folder that the images are written to.
        source: sklearn needs scikit-learn and no network; mnist is downloaded by torchvision.
        img_size: Side of the square that the model sees, in pixels.
        recipe: Augmentation, see the other data; the flips of most recipes make no sense here.
        **options: Those of :class:`gn_transfer.data.ImageDataModule`.
    """

    WRITTEN = ("sklearn", "mnist")

    def __init__(
        self,
        root: Path | str = "data_digits",
        source: DigitSource = "sklearn",
        img_size: int = 28,
        recipe: Recipe = "none",
        **options: Any,
    ) -> None:
        super().__init__(Path(root) / source, img_size=img_size, recipe=recipe, test_fraction=0.0, **options)
        self.source: DigitSource = source

    def prepare_data(self) -> None:
        """Write the images unless they are there; Lightning calls it once per machine."""
        write_digits(Path(self.root), self.source)


def write_digits(folder: Path, source: DigitSource) -> None:
    """Write digits as PNG files; whole or not at all.

    Args:
        folder: Will hold ``train`` and ``test``; made if missing.
        source: Which digits.

    Raises:
        ConfigError: scikit-learn or the network is missing, or the folder cannot be written.
    """
    stamp = {"version": _VERSION, "source": source}
    if _read_stamp(folder) == stamp:
        return
    if folder.exists() and any(folder.iterdir()) and _read_stamp(folder) != stamp:  # another run may just have put it
        raise ConfigError(f"{folder} holds something else than these digits; give them another data.root.")
    splits = _sklearn_digits() if source == "sklearn" else _mnist(folder.parent)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".digits-", dir=folder.parent) as scratch:
            fresh = Path(scratch, "digits")
            for split, (images_NHW, targets) in splits.items():
                for digit in range(10):
                    (fresh / split / str(digit)).mkdir(parents=True)
                for number, (image_HW, digit) in enumerate(zip(images_NHW, targets, strict=True)):
                    margin = (CANVAS - len(image_HW)) // 2
                    _, png = cv2.imencode(".png", np.pad(image_HW, margin))
                    (fresh / split / str(digit) / f"{number:05}.png").write_bytes(png.tobytes())
            (fresh / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
            try:
                fresh.rename(folder)  # replaces an empty folder
            except OSError:  # another run has put its own there meanwhile
                if _read_stamp(folder) != stamp:
                    raise
    except OSError as error:
        raise ConfigError(f"data.root={folder.parent}: the digits cannot be written there ({error}).") from error


Labelled = tuple[npt.NDArray[np.uint8], list[int]]


def _sklearn_digits() -> dict[str, Labelled]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "data.source=sklearn needs scikit-learn: pip install scikit-learn, or choose data.source=mnist."
        ) from error
    bunch = load_digits()  # 8 x 8, values 0 to 16
    small = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.stack([cv2.resize(image, (28, 28), interpolation=cv2.INTER_LINEAR) for image in small]).astype(np.uint8)
    targets = [int(target) for target in bunch.target]
    names = [f"{number:05}" for number in range(len(targets))]
    parts = stratified_split(names, targets, _TEST_SHARE, seed=0)
    return {
        split: (images[positions], [targets[position] for position in positions])
        for split, positions in zip(("train", "test"), parts, strict=True)
    }


def _mnist(folder: Path) -> dict[str, Labelled]:
    from torchvision.datasets import MNIST

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mnist-", dir=folder) as scratch:
            parts = {split: MNIST(scratch, train=split == "train", download=True) for split in ("train", "test")}
            return {split: (part.data.numpy(), part.targets.tolist()) for split, part in parts.items()}
    except (OSError, RuntimeError) as error:  # RuntimeError: torchvision has tried all its mirrors
        raise ConfigError(
            f"data.source=mnist: MNIST could not be downloaded ({error}); try again with a network, or choose "
            "data.source=sklearn."
        ) from error


def _read_stamp(folder: Path) -> object:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
