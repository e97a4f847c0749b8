"""What an image goes through before evaluation and prediction. numpy and OpenCV only, so that a bundle repeats it."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

CROP_FRACTION = 0.875
"""Side of the evaluated square as a fraction of the image's short side (224 of 256, as ImageNet models are scored)."""


def preprocess_image(image_HWC: npt.NDArray[np.uint8], img_size: int) -> npt.NDArray[np.uint8]:
    """Cut the centre square of 87.5 % of the short side and resize it.

    The same as "resize the short side to ``img_size / 0.875``, crop the centre", but the crop comes first: a
    very long image costs no memory.

    Args:
        image_HWC: Pixels, shape ``(H, W, 3)``.
        img_size: Side of the result in pixels.

    Returns:
        Pixels, shape ``(img_size, img_size, 3)``: averaged over areas where the square shrinks (no aliasing), bilinear
        where it grows.

    Example:
        >>> preprocess_image(np.zeros((60, 100, 3), np.uint8), 32).shape
        (32, 32, 3)
    """
    height, width = image_HWC.shape[:2]
    side = max(1, round(CROP_FRACTION * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    square = image_HWC[top : top + side, left : left + side]
    interpolation = cv2.INTER_AREA if side > img_size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(square, (img_size, img_size), interpolation=interpolation), dtype=np.uint8)
