"""What models said of the images of a split: stored by a run, read here, measured on any weighting of the images."""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gn_transfer.files import read_text

Array: TypeAlias = npt.NDArray[np.float64]

RESAMPLES = 2000
"""Bootstrap samples of an interval."""

_BLOCK = 4_000_000  # weights of images at a time


@dataclass(frozen=True)
class SplitPredictions(ABC):
    """What a model said of each image of a split.

    Attributes:
        paths: Relative to the data's root, sorted.
    """

    paths: list[str]

    @cached_property
    def digest(self) -> str:
        """Equal for runs that were evaluated on the same images, whatever the order was."""
        return hashlib.sha256("\0".join(self.paths).encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def value(self) -> float:
        """The metric over all images."""
        return float(self.measure(np.ones((1, len(self.paths))))[0])

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Give a percentile bootstrap interval of the metric over images."""
        ends = [(1 - level) / 2, (1 + level) / 2]
        measured = [self.measure(weights_RP) for weights_RP in weight_blocks(len(self.paths), 0)]
        low, high = np.nanquantile(np.concatenate(measured), ends)
        return float(low), float(high)

    @abstractmethod
    def measure(self, weights_RP: Array) -> Array:
        """Compute the metric where each image counts as often as a weight says, shape ``(R,)``."""

    @property
    @abstractmethod
    def guess(self) -> float:
        """The metric of a model that always names the most frequent class."""

    @abstractmethod
    def opinions(self) -> Iterator[tuple[str, str, float, str]]:
        """Give path, true class, score in [0, 1], and what was predicted in a word, of each image."""

    @abstractmethod
    def by_class(self, among: Set[str]) -> dict[str, float]:
        """Compute the metric of every class on some of the images, by their paths."""


@dataclass(frozen=True)
class Predictions(SplitPredictions):
    """Classes of images.

    Attributes:
        targets: Names of their classes.
        predicted: Names of the classes that the model gave.
        prob_target: Probability of the target, shape ``(P,)``; None where it was not read.
        prob_predicted: Probability of the predicted class, likewise; None also in runs of before it was stored.
    """

    targets: list[str]
    predicted: list[str]
    prob_target: Array | None = None
    prob_predicted: Array | None = None

    @cached_property
    def correct(self) -> npt.NDArray[np.float32]:
        """1 where the model was right, shape ``(P,)``."""
        return np.array([a == b for a, b in zip(self.targets, self.predicted, strict=True)], dtype=np.float32)

    def measure(self, weights_RP: Array) -> Array:
        """Compute the accuracy; see the base class."""
        return np.asarray(weights_RP @ self.correct.astype(np.float64) / weights_RP.sum(1))

    @property
    def guess(self) -> float:
        """Share of the most frequent class."""
        return max(Counter(self.targets).values()) / len(self.targets)

    def opinions(self) -> Iterator[tuple[str, str, float, str]]:
        """Score 1 where the class is right."""
        return zip(self.paths, self.targets, self.correct.tolist(), self.predicted, strict=True)

    def by_class(self, among: Set[str]) -> dict[str, float]:
        """Compute the accuracy on the images of every class; see the base class."""
        inside = [path in among for path in self.paths]
        names, places = np.unique(np.array(self.targets)[inside], return_inverse=True)
        right = np.bincount(places, self.correct[inside]) / np.bincount(places)
        return dict(zip(names.tolist(), right.tolist(), strict=True))


@dataclass(frozen=True)
class PixelPredictions(SplitPredictions):
    """Classes of pixels, counted in every image.

    Attributes:
        classes: Their names.
        intersection: Pixels that belong to a class and were given it, shape ``(P, classes)``.
        union: Pixels that belong to a class or were given it, likewise.
        pixels: Labeled pixels of each class, likewise.
    """

    classes: list[str]
    intersection: Array
    union: Array
    pixels: Array

    def measure(self, weights_RP: Array) -> Array:
        """Compute the mean IoU over classes, of the pixels of all images together."""
        return np.asarray(np.nanmean(_ratio(weights_RP @ self.intersection, weights_RP @ self.union), axis=1))

    @property
    def guess(self) -> float:
        """Mean IoU of a model that gives every pixel the most frequent class."""
        totals = self.pixels.sum(0)
        return float(totals.max() / totals.sum() / (totals > 0).sum())

    @cached_property
    def image_ious(self) -> Array:
        """Mean IoU of each image over the classes that are there, shape ``(P,)``; nan without a labeled pixel."""
        ious = _ratio(self.intersection, self.union)
        return _ratio(np.nansum(ious, axis=1), (~np.isnan(ious)).sum(1))

    def opinions(self) -> Iterator[tuple[str, str, float, str]]:
        """Score an image by its mean IoU; it has no single class. Images without a labeled pixel are left out."""
        for path, score in zip(self.paths, self.image_ious.tolist(), strict=True):
            if score == score:
                yield path, "", score, f"IoU {100 * score:.0f} %"

    def by_class(self, among: Set[str]) -> dict[str, float]:
        """Compute the IoU of every class that occurs or was given; see the base class."""
        some = [path in among for path in self.paths]
        ious = _ratio(self.intersection[some].sum(0), self.union[some].sum(0))
        return {name: float(iou) for name, iou in zip(self.classes, ious, strict=True) if not np.isnan(iou)}


def _ratio(inside: Array, union: Array) -> Array:
    return np.where(union > 0, inside / np.maximum(union, 1e-12), np.nan)


def image_weights(images: int, number: int) -> Array:
    """Resample images: how often each of them is in each sample.

    Args:
        images: How many there are.
        number: Of their list, so that different lists get different samples.

    Returns:
        Shape ``(RESAMPLES, images)``; a row adds up to the number of images.
    """
    return np.concatenate(list(weight_blocks(images, number)))


def weight_blocks(images: int, number: int) -> Iterator[Array]:
    """Give the rows of :func:`image_weights` in blocks of a size that memory has room for."""
    generator = np.random.default_rng([0, number])
    rows = max(1, _BLOCK // max(1, images))
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        yield generator.multinomial(images, np.full(images, 1 / images), size=size).astype(np.float64)


def read_predictions(file: Path, *, probabilities: bool = False) -> SplitPredictions | None:
    """Read what a run stored of each image.

    Args:
        file: ``predictions_*.csv`` of a run.
        probabilities: Read them too.

    Returns:
        None where there is no such file, or it is corrupt.
    """
    try:
        rows = csv.reader(io.StringIO(read_text(file), newline=""))
        header = next(rows)
        if header[:3] == ["path", "target", "predicted"]:
            return _of_images(rows, 5 if probabilities else 3)
        if header[:2] == ["path", "miou"]:
            return _of_pixels(header[2:], rows)
    except (OSError, ValueError, StopIteration, TypeError, IndexError, csv.Error):
        pass
    return None


def _of_images(rows: Iterator[list[str]], width: int) -> Predictions:
    # Interned: the same names come in every run.
    # Sorted: BN evaluated with batch statistics sees its images in an order of its own.
    table = sorted([*map(sys.intern, row[:3]), *row[3:width]] for row in rows)
    paths, targets, predicted, *probs = map(list, zip(*table, strict=True))
    columns = [np.array(column, dtype=np.float64) for column in probs]
    if not all(((column >= 0) & (column <= 1)).all() for column in columns):  # also for what is no number
        raise ValueError("no probabilities")
    return Predictions(paths, targets, predicted, *columns)


def _of_pixels(columns: Sequence[str], rows: Iterator[list[str]]) -> PixelPredictions:
    table = sorted(rows)
    counts = np.array([row[2:] for row in table], dtype=np.float64).reshape(len(table), -1, 3)
    classes = [name.partition(":")[2] for name in columns[::3]]
    if counts.shape[1] != len(classes) or not table:
        raise ValueError("columns that do not fit")
    return PixelPredictions([sys.intern(row[0]) for row in table], classes, *np.moveaxis(counts, 2, 0))
