"""Which part of an image decided: by covering it piece by piece. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.inference.classification import ClassificationBundle
from gn_transfer.inference.image_source import Pixels

HeatMap: TypeAlias = npt.NDArray[np.float32]
Explain: TypeAlias = Callable[[Pixels, int], HeatMap]
"""Takes the square that the graph sees, and the number of a class. Gives ``(height, width)`` in [0, 1]."""

_STEPS = 7
_BATCH_SIZE = 16
_COLOR_SHARE = 0.45


def occlusion(bundle: ClassificationBundle) -> Explain:
    """Explain by occlusion (Zeiler and Fergus 2014, arXiv:1311.2901).

    A square of a quarter of the side, in the image's mean color, covers 7 x 7 places. Where the logit of the class
    falls most, the map is hottest.

    Args:
        bundle: The bundle.

    Returns:
        The explanation; it runs the graph on 50 images.
    """

    def explain(square_HWC: Pixels, number: int) -> HeatMap:
        side = len(square_HWC)
        cover = side // 4
        starts = np.linspace(0, side - cover, _STEPS).round().astype(int)
        mean = square_HWC.reshape(-1, 3).mean(0).round().astype(np.uint8)
        covered = np.repeat(square_HWC[None], _STEPS**2, axis=0)
        for place, image in enumerate(covered):
            row, column = starts[place // _STEPS], starts[place % _STEPS]
            image[row : row + cover, column : column + cover] = mean
        batches = [covered[start : start + _BATCH_SIZE] for start in range(0, len(covered), _BATCH_SIZE)]
        logits = np.concatenate([bundle.logits_and_probs(batch)[0][:, number] for batch in batches])
        whole = bundle.logits_and_probs(square_HWC[None])[0][0, number]
        return scaled((whole - logits).reshape(_STEPS, _STEPS), side)

    return explain


def scaled(importance: npt.NDArray[np.floating], side: int) -> HeatMap:
    """Bring a coarse map to the size of the image, from 0 (nothing, or against the class) to 1.

    Args:
        importance: Shape ``(rows, columns)``.
        side: Of the image, in pixels.
    """
    positive = np.maximum(importance, 0).astype(np.float32)
    enlarged = cv2.resize(positive, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(enlarged / max(float(positive.max()), 1e-12), 0, 1), dtype=np.float32)


def laid_over(square_HWC: Pixels, heat: HeatMap) -> Pixels:
    """Lay a heat map over its image: blue is cold, red is hot.

    Args:
        square_HWC: Pixels, uint8 RGB.
        heat: Of the same height and width, in [0, 1].
    """
    colors = cv2.cvtColor(cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    return np.asarray(cv2.addWeighted(square_HWC, 1 - _COLOR_SHARE, colors, _COLOR_SHARE, 0), dtype=np.uint8)
