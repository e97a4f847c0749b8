"""Probabilities that mean what they say: a temperature fitted on validation images, and where to answer "unknown"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from gn_transfer.config import ConfigError
from gn_transfer.report.calibration import compare_confidence, wilson_interval

Array = npt.NDArray[np.float32]
Targets = npt.NDArray[np.int64]

FEWEST_IMAGES = 50
"""Validation images from which on a temperature is fitted."""

_BOUNDS = (0.1, 10.0)
_FOLDS = 5


@dataclass(frozen=True)
class Temperature:
    """What divides the logits before the softmax (Guo et al. 2017, arXiv:1706.04599).

    Attributes:
        value: Above 1 where the model is more confident than it is right.
        images: Validation images that it was fitted on; 0 where it was not fitted, and is 1.
        ece_before: Expected calibration error of these images with temperature 1, in 10 bins.
        ece_after: The same with the temperature. Each fifth of the images is measured with the temperature of the
            other four fifths, so that it is no error on images that were fitted.
        reason: Why it was not fitted; empty where it was.
    """

    value: float
    images: int
    ece_before: float | None
    ece_after: float | None
    reason: str = ""

    def summary(self) -> str:
        """Say it in a line."""
        if self.reason:
            return f"temperature 1: {self.reason}"
        return (
            f"temperature {self.value:.3f}, fitted on {self.images:,} validation images: expected calibration error "
            f"{self.ece_before:.4f} before, {self.ece_after:.4f} after"
        )


@dataclass(frozen=True)
class Threshold:
    """The probability below which a prediction counts as unknown.

    Attributes:
        probability: The least probability of an answer.
        precision: Wanted share of right answers.
        reached: Their share on the validation images.
        low: Lower end of its 95 % interval.
        high: Its upper end.
        answered: Share of the validation images that get an answer.
    """

    probability: float
    precision: float
    reached: float
    low: float
    high: float
    answered: float

    def summary(self) -> str:
        """Say it in a line."""
        return (
            f"unknown below {self.probability:.3f}: {self.answered:.1%} of the validation images are answered, "
            f"{self.reached:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}] of these right "
            f"(wanted {self.precision:.1%})"
        )


def fit_temperature(logits: Array, targets: Targets) -> Temperature:
    """Fit the temperature of the least negative log-likelihood.

    Args:
        logits: Of the validation images, shape ``(N, classes)``.
        targets: Their classes, shape ``(N,)``.

    Returns:
        Between 0.1 and 10. It is 1 for fewer than 50 images, and where none is wrong: then nothing says how confident
        is too confident.

    Example:
        >>> logits = np.tile(np.array([[4.0, 0.0]], np.float32), (100, 1))
        >>> targets = np.repeat([0, 1], [80, 20])  # 80 % are right, and the model claims 98 %
        >>> fitted = fit_temperature(logits, targets)
        >>> f"{fitted.value:.2f} {1 / (1 + np.exp(-4 / fitted.value)):.2f} {fitted.ece_before:.2f}"
        '2.89 0.80 0.18'
    """
    images = len(targets)
    if images < FEWEST_IMAGES:
        return Temperature(1.0, 0, None, None, f"{images} validation images are too few to fit it ({FEWEST_IMAGES})")
    if (logits.argmax(1) == targets).all():
        return Temperature(1.0, 0, None, None, "no validation image is wrong, so nothing says what is too confident")
    folds = np.random.default_rng(0).permutation(images) % _FOLDS
    probs = np.empty(logits.shape, np.float64)
    for fold in range(_FOLDS):
        held = folds == fold
        probs[held] = softmax(logits[held] / _best(logits[~held], targets[~held]), axis=1)
    return Temperature(_best(logits, targets), images, _error(softmax(logits, axis=1), targets), _error(probs, targets))


def choose_threshold(probs: Array, targets: Targets, precision: float) -> Threshold:
    """Find the least probability from which on answers are right as often as wanted.

    Args:
        probs: Of the validation images, shape ``(N, classes)``.
        targets: Their classes, shape ``(N,)``.
        precision: Wanted share of right answers, in (0, 1].

    Returns:
        The threshold that leaves most images answered: half-way between the least confident image that is answered
        and the next one, so that rounding decides nothing.

    Raises:
        ConfigError: No threshold reaches it.

    Example:
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.55, 0.45]], np.float32)
        >>> found = choose_threshold(probs, np.array([0, 0, 1, 0]), 0.9)
        >>> round(found.probability, 2), found.reached, found.answered
        (0.7, 1.0, 0.5)
    """
    confidence, right = probs.max(1), probs.argmax(1) == targets
    order = np.argsort(-confidence, kind="stable")
    shares = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Images of the same confidence are answered together, or not at all.
    last_of_its_confidence = np.append(confidence[order][1:] < confidence[order][:-1], True)
    enough = np.flatnonzero((shares >= precision) & last_of_its_confidence)
    if not len(enough):
        best = shares[last_of_its_confidence].max()
        raise ConfigError(
            f"--precision {precision:g}: no threshold reaches it on the {len(targets):,} validation images; the most "
            f"is {best:.4f}. Ask for less, or train a better model."
        )
    answered = int(enough[-1]) + 1
    correct = int(right[order][:answered].sum())
    lowest = float(confidence[order][answered - 1])
    next_below = float(confidence[order][answered]) if answered < len(targets) else 0.0
    middle = float(np.float32((lowest + next_below) / 2))
    return Threshold(
        middle if middle > next_below else lowest,  # between neighbours there is no other float32
        precision,
        correct / answered,
        *wilson_interval(correct, answered),
        answered / len(targets),
    )


def _best(logits: Array, targets: Targets) -> float:
    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[rows, targets].mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_BOUNDS), method="bounded").x))


def _error(probs: npt.NDArray[np.floating], targets: Targets) -> float:
    return compare_confidence(probs.max(1), probs.argmax(1) == targets).error
