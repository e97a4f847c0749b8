"""Pictures on disk as a torch data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gn_transfer.data.decode import BadImageError, check_image, decode_image
from gn_transfer.data.preprocess import preprocess_image
from gn_transfer.data.sampler import Key, sample_seed
from gn_transfer.data.transforms import Augmentation


class Picture(NamedTuple):
    """One labelled file.

    Attributes:
        path: Relative to the data module's root, with forward slashes.
        target: Class index.
    """

    path: str
    target: int


class PictureDataset(Dataset[tuple[Tensor, int]]):
    """Decode, crop to the square, hand out pixels and class index.

    Args:
        root: What the pictures' paths are relative to.
        pictures: The files with their classes.
        img_size: Side of the square in pixels.
        augmentation: None evaluates: centre crop, no randomness.
        seed: First part of each sample's seed (seed, epoch, index).
    """

    def __init__(
        self,
        root: Path,
        pictures: Sequence[Picture],
        img_size: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.root = root
        self.pictures = list(pictures)
        self.img_size = img_size
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        """Fetch one picture.

        Args:
            key: ``(epoch, index)``; an index alone means epoch 0.

        Returns:
            Pixels, uint8, shape ``(3, img_size, img_size)``, and the class index.

        Raises:
            BadImageError: The file cannot be decoded.
        """
        epoch, index = (0, key) if isinstance(key, int) else key
        path, target = self.pictures[index]
        try:
            pixels_HWC = decode_image(self.root / path)
        except BadImageError as error:
            raise with_remedy(error) from error
        if self.augmentation is None:
            pixels_HWC = preprocess_image(pixels_HWC, self.img_size)
        else:
            pixels_HWC = self.augmentation(pixels_HWC, sample_seed(self.seed, epoch, index))
        return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))), target


def collate(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Stack samples: images uint8 ``(B, 3, H, W)``, targets int64 ``(B,)``."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(targets, dtype=torch.int64)


def init_worker(worker_id: int) -> None:
    """Keep OpenCV to one thread in a data worker: its pool does not survive a fork, and the cores are spoken for."""
    cv2.setNumThreads(0)


def find_bad_images(root: Path, paths: Iterable[str], *, decode: bool, threads: int) -> list[BadImageError]:
    """Verify files, several at a time.

    Args:
        root: What the paths are relative to.
        paths: The files.
        decode: True decodes each; False looks at its two ends only.
        threads: How many at a time, >= 1.

    Returns:
        One error per bad file, in the order of ``paths``.
    """

    def verify(path: str) -> BadImageError | None:
        try:
            if decode:
                decode_image(root / path)
            else:
                check_image(root / path)
        except BadImageError as error:
            return error
        return None

    with ThreadPoolExecutor(threads) as pool:
        return [error for error in pool.map(verify, paths) if error is not None]


def with_remedy(error: BadImageError) -> BadImageError:
    """Say in a bad picture's message what the user can do about it."""
    return BadImageError(error.path, f"{error.reason}. Repair or remove the file, or set data.on_bad_image to skip.")
