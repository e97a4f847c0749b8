"""At which resolution a split needs its images, before anything random happens: decided by the recipe.

The cache keeps images at this resolution. Without a cache they are decoded anew, so a cached run sees the same pixels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.data.decode import decode_image, decode_mask
from gn_transfer.data.preprocess import preprocess_image, reduce_image, reduce_mask, reduced_shape

_SLACK = 4 / 3  # a reduction by less saves little room, and would cost as much time as decoding


@dataclass(frozen=True)
class Resolution:
    """A way to bring a file to pixels.

    Attributes:
        kind: ``eval`` is the centre square of evaluation. ``square`` is the whole image, resized to a square.
            ``short`` keeps the aspect ratio and reduces the short side to ``side`` if it is more than a third longer.
            ``whole`` is the image of a segmentation and ``mask`` its mask: the short side is at most ``side``, 0 for
            any.
        side: In pixels.
    """

    kind: Literal["eval", "square", "short", "whole", "mask"]
    side: int

    @property
    def channels(self) -> int:
        """Channels of what is loaded."""
        return 1 if self.kind == "mask" else 3

    @property
    def name(self) -> str:
        """Name of its folder in the cache, such as ``short-437``."""
        return f"{self.kind}-{self.side}"

    def load(self, path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
        """Decode a file, at reduced scale where that is enough.

        ``eval`` decodes at full scale, as ``predict`` does: validation and a bundle see the same pixels.

        Args:
            path: The file.

        Returns:
            Pixels, shape ``(H, W, 3)``, RGB; the values of a mask, shape ``(H, W, 1)``.

        Raises:
            BadImageError: The file cannot be decoded.
        """
        if self.kind == "eval":
            return preprocess_image(decode_image(path), self.side)
        if self.kind == "whole":
            return reduce_image(decode_image(path), self.side)
        if self.kind == "mask":
            return reduce_mask(decode_mask(path), self.side)[:, :, None]
        pixels_HWC = decode_image(path, least_side=self.side)
        height, width = pixels_HWC.shape[:2]
        size = (self.side, self.side)
        if self.kind == "short":
            if min(height, width) <= _SLACK * self.side:
                return pixels_HWC
            scale = self.side / min(height, width)
            size = (max(self.side, round(width * scale)), max(self.side, round(height * scale)))
        interpolation = cv2.INTER_AREA if min(height, width) > self.side else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(pixels_HWC, size, interpolation=interpolation), dtype=np.uint8)

    def stored_shape(self, height: int, width: int) -> tuple[int, int]:
        """Compute height and width of an image at this resolution, without decoding it.

        Args:
            height: Of the file, in pixels, upright.
            width: Likewise.

        Example:
            >>> Resolution("short", 437).stored_shape(3000, 4000)
            (437, 583)
        """
        if self.kind in ("whole", "mask"):
            return reduced_shape(height, width, self.side)
        if self.kind != "short":
            return self.side, self.side
        scale = self.side / min(height, width) if min(height, width) > _SLACK * self.side else 1.0
        return max(1, round(height * scale)), max(1, round(width * scale))
