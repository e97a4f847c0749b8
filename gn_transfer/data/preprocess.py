"""What an image goes through before evaluation and prediction. numpy and OpenCV only, so that a bundle repeats it."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

CROP_FRACTION = 0.875
"""Side of the evaluated square as a fraction of the image's short side (224 of 256, as ImageNet models are scored)."""


def reduced_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Give the shape that an image is segmented at: its short side reduced to a length, never enlarged.

    Args:
        height: Of the image, in pixels.
        width: Likewise.
        short_side: Greatest length of the short side in pixels; 0 keeps the image as it is.

    Example:
        >>> reduced_shape(300, 400, 150), reduced_shape(90, 120, 150), reduced_shape(300, 400, 0)
        ((150, 200), (90, 120), (300, 400))
    """
    shorter = min(height, width)
    if short_side == 0 or shorter <= short_side:
        return height, width
    return round(height * short_side / shorter), round(width * short_side / shorter)


def reduce_image(image_HWC: npt.NDArray[np.uint8], short_side: int) -> npt.NDArray[np.uint8]:
    """Reduce an image to the shape that it is segmented at, averaging over areas; see :func:`reduced_shape`."""
    height, width = reduced_shape(image_HWC.shape[0], image_HWC.shape[1], short_side)
    if (height, width) == image_HWC.shape[:2]:
        return image_HWC
    return np.asarray(cv2.resize(image_HWC, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def reduce_mask(mask_HW: npt.NDArray[np.uint8], short_side: int) -> npt.NDArray[np.uint8]:
    """Reduce a mask likewise, taking the value in the middle of each area."""
    height, width = reduced_shape(mask_HW.shape[0], mask_HW.shape[1], short_side)
    if (height, width) == mask_HW.shape:
        return mask_HW
    return np.asarray(cv2.resize(mask_HW, (width, height), interpolation=cv2.INTER_NEAREST_EXACT), dtype=np.uint8)


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
