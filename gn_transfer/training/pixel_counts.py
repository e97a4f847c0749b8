"""What a segmentation is measured by: the pixels of every class in prediction and truth, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gn_transfer.data.masks import IGNORED


def count_pixels(preds: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of every class: in intersection and union of prediction and truth, and in the truth.

    Args:
        preds: Class of each pixel, shape ``(B, H, W)``.
        targets: True class, likewise; :data:`gn_transfer.data.masks.IGNORED` does not count.
        num_classes: Number of classes.

    Returns:
        int64, shape ``(3 * num_classes, B)``: three counts of the first class, then those of the second.
    """
    labeled = targets != IGNORED
    counts = []
    for number in range(num_classes):
        given, true = (preds == number) & labeled, targets == number
        counts += [(given & true).sum((1, 2)), (given | true).sum((1, 2)), true.sum((1, 2))]
    return torch.stack(counts)


def mean_iou(counts: Sequence[float]) -> float | None:
    """Average the intersection over union of an image over the classes that are there.

    Args:
        counts: Those of one image; see :func:`count_pixels`.

    Returns:
        None where no pixel is labeled.

    Example:
        >>> mean_iou([3, 4, 3, 1, 2, 2, 0, 0, 0])
        0.625
    """
    ious = [inside / union for inside, union in zip(counts[::3], counts[1::3], strict=True) if union]
    return sum(ious) / len(ious) if ious else None
