"""Bundles that classify every pixel of an image. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime

from gn_transfer.data.decode import BadImageError
from gn_transfer.data.preprocess import reduce_image
from gn_transfer.data.tiles import blending_window, tile_places
from gn_transfer.inference.bundle import Bundle
from gn_transfer.inference.image_source import ImageSource, Pixels, prepared_batches, read_image, without_errors

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Segmentation:
    """What a bundle says about the pixels of one image.

    Attributes:
        path: The image's file; None for pixels and contents of files.
        mask: Class of each pixel of the image, a position in :attr:`classes`: uint8 ``(H, W)``.
        logits: Of every class at the size that the image was segmented at, float32 ``(classes, h, w)``. It is smaller
            than the image where the bundle's ``short_side`` says so.
        classes: Names of the classes.
    """

    path: str | None
    mask: Pixels = field(repr=False, compare=False)
    logits: Array = field(repr=False, compare=False)
    classes: tuple[str, ...]

    @property
    def probs(self) -> Array:
        """Probability of every class in each pixel of the image, float32 ``(classes, H, W)``; computed anew."""
        return np.stack([_enlarged(one, self.mask.shape) for one in _softmax(self.logits)])

    @property
    def pixels(self) -> dict[str, int]:
        """Pixels of the mask by class."""
        counts = np.bincount(self.mask.reshape(-1), minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))


class SegmentationBundle(Bundle):
    """A bundle that names the class of every pixel of an image.

    Its graph takes ``images``, uint8 ``(batch, height, width, 3)`` of any height and width, and gives ``logits`` and
    ``probs``, float32 ``(batch, classes, height, width)``, and ``classes``, uint8 ``(batch, height, width)``.

    Args:
        folder: See :class:`Bundle`.
        metadata: See there.
        session: See there.

    Attributes:
        short_side: Images are reduced to this length of their short side, in pixels; 0 keeps all as they are.
        tile_size: Larger images go through the graph in tiles of this side; None: all go whole.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], session: onnxruntime.InferenceSession) -> None:
        super().__init__(folder, metadata, session)
        self.short_side = int(metadata["short_side"])
        self.tile_size: int | None = metadata["tile_size"]

    def predict(self, images: Iterable[ImageSource]) -> list[Segmentation]:
        """Segment images.

        Args:
            images: A list of paths, contents of image files (bytes), uint8 RGB arrays ``(H, W, 3)`` of any size, or
                Pillow images, mixed as you like.

        Returns:
            One segmentation per image, in their order.

        Raises:
            BadImageError: An image that cannot be decoded; :meth:`iter_predict` goes on after one.
            ConfigError: An array that holds no image.
        """
        return without_errors(self.iter_predict(images))

    def iter_predict(self, images: Iterable[ImageSource]) -> Iterator[Segmentation | BadImageError]:
        """Segment any number of images in bounded memory, one at a time, since each has a size of its own.

        Args:
            images: See :meth:`predict`; taken one by one as they are needed.

        Yields:
            In the order of the images: a segmentation, or the error of an image that cannot be decoded.

        Raises:
            ConfigError: See :meth:`predict`.
        """
        for [(path, pixels)] in prepared_batches(images, read_image, 1):
            yield pixels if isinstance(pixels, BadImageError) else self._segment(path, pixels)

    def graph_input(self, image: ImageSource) -> Pixels:
        """Reduce the image to the size that it is segmented at, and cut the middle tile of a large one."""
        image_HWC = reduce_image(read_image(image), self.short_side)
        height, width = image_HWC.shape[:2]
        places = tile_places(height, width, self.tile_size or max(height, width))
        rows, columns = places[len(places) // 2]
        return np.ascontiguousarray(image_HWC[rows, columns])

    def logits(self, image_HWC: Pixels) -> Array:
        """Run the graph on an image, whole or in tiles.

        Args:
            image_HWC: Pixels, uint8, shape ``(h, w, 3)``, RGB, at the size to segment it at.

        Returns:
            Logits, float32 ``(classes, h, w)``.
        """
        height, width = image_HWC.shape[:2]
        tile = self.tile_size
        if tile is None or (height <= tile and width <= tile):
            [logits] = self._run(image_HWC[None], "logits")
            return np.asarray(logits[0], dtype=np.float32)
        window = blending_window(min(tile, height), min(tile, width))
        total = np.zeros((len(self.classes), height, width), np.float32)
        weights = np.zeros((height, width), np.float32)
        for rows, columns in tile_places(height, width, tile):
            [logits] = self._run(np.ascontiguousarray(image_HWC[rows, columns])[None], "logits")
            total[:, rows, columns] += window * logits[0]
            weights[rows, columns] += window
        return total / weights

    def _segment(self, path: str | None, image_HWC: Pixels) -> Segmentation:
        logits = self.logits(reduce_image(image_HWC, self.short_side))
        shape = image_HWC.shape[:2]
        if logits.shape[1:] == shape:
            mask = logits.argmax(0).astype(np.uint8)
        else:  # class by class: all of a large image at once would not fit the memory
            best, mask = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
            for number, probs in enumerate(_softmax(logits)):
                enlarged = _enlarged(probs, shape)
                mask[enlarged > best] = number
                np.maximum(best, enlarged, out=best)
        return Segmentation(path, mask, logits, tuple(self.classes))


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(0))
    return np.asarray(shifted / shifted.sum(0), dtype=np.float32)


def _enlarged(probs: Array, shape: tuple[int, ...]) -> Array:
    if probs.shape == shape:
        return probs
    return np.asarray(cv2.resize(probs, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR), dtype=np.float32)
