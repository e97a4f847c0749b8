"""Whether a model is right as often as it claims, and how sure a share of right images is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from gn_transfer.report.predictions import Predictions

BINS = 10
"""Intervals of confidence of equal width in the calibration curve."""


@dataclass(frozen=True)
class Bin:
    """The images whose confidence lies in an interval.

    Attributes:
        confidence: Its mean.
        accuracy: Share of them that were right.
        low: Lower end of the 95 % interval of the accuracy.
        high: Its upper end.
        images: How many there are.
    """

    confidence: float
    accuracy: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class Calibration:
    """Whether the model is right as often as it claims.

    Attributes:
        bins: Those that hold an image, by rising confidence.
        error: The expected calibration error: mean distance of confidence and accuracy over images.
        confidence: Mean probability of the predicted class.
        accuracy: Share of right predictions.
    """

    bins: list[Bin]
    error: float
    confidence: float
    accuracy: float


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share (Wilson 1927, as scipy has it).

    Example:
        >>> [round(end, 3) for end in wilson_interval(8, 10)]
        [0.49, 0.943]
    """
    interval = binomtest(right, images).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def calibration(predictions: Predictions) -> Calibration | None:
    """Compare confidence with accuracy (Guo et al. 2017, arXiv:1706.04599, with 10 bins).

    Args:
        predictions: Of a split, with probabilities.

    Returns:
        None where the probability of the predicted class was not stored.
    """
    confidence = predictions.prob_predicted
    return None if confidence is None else compare_confidence(confidence, predictions.correct)


def compare_confidence(confidence: npt.NDArray[np.floating], right: npt.NDArray[Any]) -> Calibration:
    """Compare confidence with accuracy; see :func:`calibration`.

    Args:
        confidence: Probability of the predicted class, shape ``(images,)``.
        right: Whether it was right, as 0 and 1, likewise.
    """
    numbers = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in np.unique(numbers):
        inside = numbers == number
        low, high = wilson_interval(int(right[inside].sum()), int(inside.sum()))
        bins.append(Bin(float(confidence[inside].mean()), float(right[inside].mean()), low, high, int(inside.sum())))
    error = sum(part.images * abs(part.confidence - part.accuracy) for part in bins) / len(right)
    return Calibration(bins, error, float(confidence.mean()), float(right.mean()))
