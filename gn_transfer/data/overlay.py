"""Classes of pixels as colors, over the image that they belong to. numpy and OpenCV only, so that a bundle uses it."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.data.contact_sheet import Line

Pixels = npt.NDArray[np.uint8]

_OPACITY = 0.55
_IGNORED = 255
# Twelve colors that people with a color vision deficiency tell apart (Paul Tol's "light" and "muted" sets).
_PALETTE = np.array(
    [
        (119, 170, 221),
        (238, 136, 102),
        (238, 221, 136),
        (255, 170, 187),
        (153, 221, 255),
        (68, 187, 153),
        (187, 204, 51),
        (170, 170, 0),
        (136, 34, 85),
        (51, 34, 136),
        (17, 119, 51),
        (204, 102, 119),
    ],
    np.uint8,
)


def class_colors(number: int) -> Pixels:
    """Give every class a color.

    Args:
        number: Classes; beyond twelve the colors repeat, darker.

    Returns:
        RGB, shape ``(number, 3)``.
    """
    rounds = np.arange(number) // len(_PALETTE)
    colors = _PALETTE[np.arange(number) % len(_PALETTE)].astype(np.float32)
    return np.asarray(colors * (0.7**rounds)[:, None], dtype=np.uint8)


def legend(texts: Mapping[int, str], number: int) -> list[Line]:
    """Give lines of a contact sheet that explain the colors of classes.

    Args:
        texts: What to say of each class, by its number.
        number: Classes.
    """
    colors = class_colors(number).tolist()
    return [(text, tuple(colors[place])) for place, text in texts.items()]


def overlay(image_HWC: Pixels, classes_HW: Pixels, number: int) -> Pixels:
    """Lay the colors of classes over an image.

    Args:
        image_HWC: Pixels RGB, shape ``(H, W, 3)``.
        classes_HW: Class of each pixel, shape ``(H, W)``; 255, which does not count, stays as it is.
        number: Classes.

    Returns:
        Shape ``(H, W, 3)``.
    """
    colors = np.zeros((256, 3), np.uint8)
    colors[:number] = class_colors(number)
    mixed = cv2.addWeighted(image_HWC, 1 - _OPACITY, colors[classes_HW], _OPACITY, 0.0)
    return np.where((classes_HW == _IGNORED)[:, :, None], image_HWC, mixed).astype(np.uint8)


def mark_errors(image_HWC: Pixels, predicted_HW: Pixels, true_HW: Pixels) -> Pixels:
    """Show where a prediction is wrong: red on the darkened grey image.

    Args:
        image_HWC: Pixels RGB, shape ``(H, W, 3)``.
        predicted_HW: Class of each pixel, shape ``(H, W)``.
        true_HW: Likewise; 255 does not count.

    Returns:
        Shape ``(H, W, 3)``.
    """
    grey = np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), dtype=np.uint8) // 2
    marked: Pixels = np.repeat(grey[:, :, None], 3, axis=2)
    marked[(predicted_HW != true_HW) & (true_HW != _IGNORED)] = (230, 60, 50)
    return marked


def square(image_HWC: Pixels, side: int) -> Pixels:
    """Fit an image into a white square.

    Args:
        image_HWC: Pixels RGB, shape ``(H, W, 3)``.
        side: In pixels.

    Returns:
        Shape ``(side, side, 3)``.
    """
    height, width = image_HWC.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    result = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    result[top : top + size[1], left : left + size[0]] = small
    return result
