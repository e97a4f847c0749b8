"""Images on disk as a torch data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gn_transfer.config import ConfigError
from gn_transfer.data.augmentation import Augmentation
from gn_transfer.data.cache_store import PixelStore
from gn_transfer.data.decode import BadImageError, check_image, decode_image
from gn_transfer.data.resolution import Resolution
from gn_transfer.data.sampler import Key, sample_seed
from gn_transfer.data.workers import core_count


class LabeledImage(NamedTuple):
    """One labelled file.

    Attributes:
        path: Relative to the data module's root, with forward slashes.
        target: Class index; of an image with a mask, the group that splits are stratified by.
        mask: Path of its mask, likewise; empty where images are classified as a whole.
    """

    path: str
    target: int
    mask: str = ""


class CachedFiles(Protocol):
    """Files that a cache decodes once.

    Attributes:
        root: What the paths are relative to.
        paths: The files.
        resolution: At which they are needed.
        store: Where what was decoded is kept; None decodes every time.
    """

    root: Path
    resolution: Resolution
    store: PixelStore | None

    @property
    def paths(self) -> list[str]:
        """The files."""
        ...


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Decode or look up in the cache, augment, hand out pixels and class index.

    Args:
        root: What the images' paths are relative to.
        images: The files with their classes.
        img_size: Side of the square in pixels.
        augmentation: None evaluates: centre crop, no randomness.
        seed: With (epoch, index) it decides the random parameters of each image.
        channels: 3 for RGB, 1 for grey.

    Attributes:
        resolution: At which resolution an image is needed before augmentation.
        store: Where decoded images are kept; None decodes every time.
    """

    def __init__(
        self,
        root: Path,
        images: Sequence[LabeledImage],
        img_size: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        channels: int = 3,
    ) -> None:
        self.root = root
        self.images = list(images)
        self.img_size = img_size
        self.augmentation = augmentation
        self.seed = seed
        self.channels = channels
        self.resolution = Resolution("eval", img_size) if augmentation is None else augmentation.resolution
        self.store: PixelStore | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def paths(self) -> list[str]:
        """Paths of the images, relative to the root."""
        return [image.path for image in self.images]

    @property
    def cached_files(self) -> Sequence[CachedFiles]:
        """What a cache may hold of this data set: the images."""
        return [self]

    @property
    def one_size(self) -> bool:
        """Whether all images have one size, so that they can be fetched several at a time."""
        return True

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        """Fetch one image.

        Args:
            key: ``(epoch, index)``; an index alone means epoch 0.

        Returns:
            Pixels, uint8, shape ``(channels, img_size, img_size)``, and the class index.

        Raises:
            BadImageError: The file cannot be decoded.
        """
        images, targets = self.batch([key])
        return images[0], int(targets[0])

    def batch(self, keys: Sequence[Key | int]) -> tuple[Tensor, Tensor]:
        """Fetch several images.

        Args:
            keys: See :meth:`__getitem__`.

        Returns:
            Images uint8 ``(B, channels, img_size, img_size)``, contiguous, and targets int64 ``(B,)``.

        Raises:
            BadImageError: A file cannot be decoded, or the user's pipeline fails on it.
        """
        images = torch.empty((len(keys), self.channels, self.img_size, self.img_size), dtype=torch.uint8)
        targets = torch.empty(len(keys), dtype=torch.int64)
        for image_CHW, (place, key) in zip(images.numpy(), enumerate(keys), strict=True):
            epoch, index = (0, key) if isinstance(key, int) else key
            pixels_HWC = self._decoded(self, index)
            if self.augmentation is not None:
                try:
                    pixels_HWC = self.augmentation(pixels_HWC, sample_seed(self.seed, epoch, index))
                except ConfigError as error:  # of a pipeline of the user
                    raise BadImageError(self.root / self.images[index].path, str(error)) from error
            if self.channels == 1:
                cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY, image_CHW[0])
            else:
                cv2.split(pixels_HWC, list(image_CHW))  # into place: six times as fast as a transposed copy
            targets[place] = self.images[index].target
        return images, targets

    @staticmethod
    def _decoded(files: CachedFiles, index: int) -> npt.NDArray[np.uint8]:
        pixels_HWC = None if files.store is None else files.store.get(index)
        if pixels_HWC is not None:
            return pixels_HWC
        try:
            return files.resolution.load(files.root / files.paths[index])
        except BadImageError as error:
            raise with_remedy(error) from error


_AT_ONCE = 64
"""Files that a thread verifies before it asks for more."""


def without_bad_images(
    root: Path, images: Sequence[LabeledImage], *, skip: bool
) -> tuple[list[LabeledImage], list[tuple[str, str]]]:
    """Verify files, one per core at a time.

    Args:
        root: What the paths of ``images`` are relative to.
        images: The images.
        skip: True decodes each file and leaves out the bad ones. False looks at the two ends of each file only.

    Returns:
        The good images, in their order, and path and reason of each bad one.

    Raises:
        BadImageError: Without ``skip``, a file is missing, empty, truncated or no image.
    """
    verify = decode_image if skip else check_image

    def error_of(image: LabeledImage) -> BadImageError | None:
        try:
            verify(f"{root}/{image.path}")
        except BadImageError as error:
            return error
        return None

    def errors_of(start: int) -> list[BadImageError | None]:
        return [error_of(image) for image in images[start : start + _AT_ONCE]]

    with ThreadPoolExecutor(core_count()) as pool:
        errors = [error for found in pool.map(errors_of, range(0, len(images), _AT_ONCE)) for error in found]
    bad = [(image.path, error.reason) for image, error in zip(images, errors, strict=True) if error is not None]
    if not skip:
        raise_first(error for error in errors if error is not None)
    return [image for image, error in zip(images, errors, strict=True) if error is None], bad


def with_remedy(error: BadImageError) -> BadImageError:
    """Add to the message what the user can do about a bad image."""
    remedy = "Repair or remove the file, or leave it out with on_bad_image skip (--data.on_bad_image skip)."
    return BadImageError(error.path, f"{error.reason}. {remedy}")


def raise_first(errors: Iterable[BadImageError]) -> None:
    """Raise the first of some errors, if there is one, with the number of the others and what to do."""
    all_of_them = list(errors)
    if all_of_them:
        first, others = all_of_them[0], len(all_of_them) - 1
        more = f" ({others} more like it)" if others else ""
        raise with_remedy(BadImageError(first.path, first.reason + more))
