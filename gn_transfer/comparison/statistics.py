"""Means over seeds with honest intervals, an exact paired test, Holm's correction. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gn_transfer.report.predictions import RESAMPLES

Array: TypeAlias = npt.NDArray[np.float64]

MOST_ENUMERATED = 16
"""Pairs up to which all sign flips are tried; beyond, 2^16 random ones."""


@dataclass(frozen=True)
class PairedTest:
    """A sign-flip test of paired differences.

    Attributes:
        pairs: Number of pairs.
        p: Two-sided p-value.
        smallest_p: The smallest p-value that so many pairs can reach.
        exact: Whether all flips were tried.
    """

    pairs: int
    p: float
    smallest_p: float
    exact: bool


def sign_flip_test(differences: Sequence[float]) -> PairedTest:
    r"""Test whether paired differences are centred at zero, by flipping their signs.

    Under the null hypothesis each difference is as likely to have the other sign, so the p-value is the share of the
    ``2^n`` sign patterns whose sum is at least as far from zero as the one seen. Source: Fisher 1935, "The Design of
    Experiments", section 21.

    Args:
        differences: One per pair, at least one.

    Returns:
        The test.

    Example:
        >>> sign_flip_test([0.1, 0.2, 0.1, 0.3, 0.1])
        PairedTest(pairs=5, p=0.0625, smallest_p=0.0625, exact=True)
    """
    values = np.asarray(differences, dtype=np.float64)
    pairs = len(values)
    exact = pairs <= MOST_ENUMERATED
    if exact:
        signs = 1 - 2 * ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], size=(2**MOST_ENUMERATED, pairs))
    # Accuracies are fractions of few images, so sums tie: rounding must not break the ties.
    extreme = int((np.abs(signs @ values) >= abs(values.sum()) - 1e-9).sum())
    if exact:
        return PairedTest(pairs, extreme / len(signs), min(1.0, 2.0 / 2**pairs), exact)
    return PairedTest(pairs, (extreme + 1) / (len(signs) + 1), 1 / (len(signs) + 1), exact)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for several contrasts.

    The k-th smallest of m is multiplied by ``m - k + 1``, and none gets below the one before. Source: Holm 1979, "A
    simple sequentially rejective multiple test procedure".

    Args:
        p_values: One per contrast.

    Returns:
        The adjusted ones, in the same order, at most 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def interval(seeds: Sequence[Array], level: float = 0.95, seed: int = 1) -> tuple[float, float]:
    """Bootstrap a mean over seeds: seeds are resampled, on top of the variation within each.

    Args:
        seeds: For each seed its value on every sample of images
            (:func:`gn_transfer.report.predictions.image_weights`), or its one value
            repeated, shape ``(RESAMPLES,)``.
        level: Coverage of the percentile interval.
        seed: Seed of the samples.

    Returns:
        Its ends. A sample of images in which nothing is labeled has no value (nan), and is left out.
    """
    values_SB = np.stack(seeds)
    drawn_SB = np.random.default_rng(seed).integers(len(seeds), size=(len(seeds), RESAMPLES))
    means = np.take_along_axis(values_SB, drawn_SB, axis=0).mean(axis=0)
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
