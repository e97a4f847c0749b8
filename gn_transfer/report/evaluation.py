"""What a model got right and wrong on the images of a split: by class and by pair of classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from gn_transfer.report.predictions import Predictions


@dataclass(frozen=True)
class ClassScore:
    """How well a class was recognized.

    Attributes:
        name: The class.
        images: Images that belong to it.
        precision: Share of the images given this class that belong to it; 0 where none was given it.
        recall: Share of its images that were given it.
        f1: Harmonic mean of both.
        taken_for: The class that its other images were given most often, and how many; None where all were right.
    """

    name: str
    images: int
    precision: float
    recall: float
    f1: float
    taken_for: tuple[str, int] | None


@dataclass(frozen=True)
class Mistake:
    """An image that was given a wrong class.

    Attributes:
        path: Relative to the folder of the data.
        target: Its class.
        predicted: The class it was given.
        prob_target: Probability of its class.
        prob_predicted: Probability of the class it was given; None where that was not stored.
    """

    path: str
    target: str
    predicted: str
    prob_target: float
    prob_predicted: float | None


def class_names(predictions: Predictions) -> list[str]:
    """List the classes that occur, as targets or as predictions."""
    return sorted({*predictions.targets, *predictions.predicted})


def confusion(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Count the images of each class (rows) that were given each class (columns), in the order of the names."""
    counts: npt.NDArray[np.int64] = confusion_matrix(
        predictions.targets, predictions.predicted, labels=class_names(predictions)
    )
    return counts


def class_scores(predictions: Predictions) -> list[ClassScore]:
    """Score each class.

    Args:
        predictions: Of a split.

    Returns:
        The classes that occur, the worst recall first.
    """
    names, mistaken = class_names(predictions), _mistaken(predictions)
    precision, recall, f1, images = precision_recall_fscore_support(
        predictions.targets, predictions.predicted, labels=names, zero_division=0.0
    )
    taken: dict[str, tuple[str, int]] = {}
    for (target, given), count in sorted(mistaken.items(), key=lambda item: (-item[1], item[0])):
        taken.setdefault(target, (given, count))
    scores = []
    for place, name in enumerate(names):
        taken_for = taken.get(name)
        scores.append(
            ClassScore(
                name, int(images[place]), float(precision[place]), float(recall[place]), float(f1[place]), taken_for
            )
        )
    return sorted(scores, key=lambda score: (score.recall, score.name))


def confused_pairs(predictions: Predictions, most: int) -> list[tuple[str, str, int]]:
    """List the most frequent confusions: class, class given, images."""
    order = sorted(_mistaken(predictions).items(), key=lambda item: (-item[1], item[0]))
    return [(target, given, count) for (target, given), count in order[:most]]


def _mistaken(predictions: Predictions) -> Counter[tuple[str, str]]:
    """Count the images by class and class given, of those that were given a wrong one."""
    pairs = zip(predictions.targets, predictions.predicted, strict=True)
    return Counter(pair for pair in pairs if pair[0] != pair[1])


def mistakes(predictions: Predictions) -> list[Mistake]:
    """List the images that were given a wrong class, the least probable target (the highest loss) first.

    Empty where the probabilities were not stored.
    """
    of_target, of_predicted = predictions.prob_target, predictions.prob_predicted
    if of_target is None:
        return []
    wrong = [
        Mistake(
            path,
            predictions.targets[place],
            predictions.predicted[place],
            float(of_target[place]),
            None if of_predicted is None else float(of_predicted[place]),
        )
        for place, path in enumerate(predictions.paths)
        if not predictions.correct[place]
    ]
    return sorted(wrong, key=lambda mistake: mistake.prob_target)
