"""Labels that are likely wrong: what models said of images that they were not trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gn_transfer.report.predictions import Predictions, read_predictions
from gn_transfer.report.runs import PREDICTIONS, runs_on_images


@dataclass(frozen=True)
class WrongLabel:
    """An image whose label is likely wrong.

    Attributes:
        path: Relative to the folder of the data.
        label: Its class, as labeled.
        suggested: The class that the models gave it.
        prob_label: Probability of its label, the mean over the runs that doubt it.
        prob_suggested: Probability of the class that they gave it, likewise.
        runs: How many runs held it out.
        agreeing: How many of them doubt its label.
    """

    path: str
    label: str
    suggested: str
    prob_label: float
    prob_suggested: float
    runs: int
    agreeing: int


def held_out_predictions(images: Path, root: Path) -> list[Predictions]:
    """Read what the runs on a folder of images said of those that they were not trained on.

    Args:
        images: The folder.
        root: Folder that contains ``runs/``.

    Returns:
        One for each split of each run: validation by the weights of best.ckpt, and test where it was tested.
    """
    found = []
    for run in runs_on_images(images, root):
        for evaluation in ("best/val", "test"):
            predictions = read_predictions(run / PREDICTIONS[evaluation], probabilities=True)
            if isinstance(predictions, Predictions) and predictions.prob_predicted is not None:
                found.append(predictions)
    return found


def likely_wrong_labels(evaluations: Iterable[Predictions], labels: Mapping[str, str]) -> list[WrongLabel]:
    """Find the labels that models contradict with confidence.

    An image counts as one of another class where the model gives that class at least the mean probability that it
    gives to images labeled so, as in confident learning (Northcutt et al. 2021, arXiv:1911.00068). Of several runs that
    held an image out, more than half must agree on the class.

    Args:
        evaluations: Of images that the models were not trained on.
        labels: The class of each image by its path, as it is now. What was evaluated under another label is left out.

    Returns:
        The most certain first: by the difference of the two probabilities.
    """
    runs: dict[str, int] = defaultdict(int)
    doubts: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for predictions in evaluations:
        for path, label in zip(predictions.paths, predictions.targets, strict=True):
            runs[path] += labels.get(path) == label
        for path, label, suggested, prob_label, prob_suggested in _doubts(predictions):
            if labels.get(path) == label:
                doubts[path, suggested].append((prob_label, prob_suggested))
    found = []
    for (path, suggested), probs in doubts.items():
        if 2 * len(probs) > runs[path]:
            of_label, of_suggested = np.mean(probs, axis=0).tolist()
            found.append(WrongLabel(path, labels[path], suggested, of_label, of_suggested, runs[path], len(probs)))
    return sorted(found, key=lambda wrong: (wrong.prob_label - wrong.prob_suggested, wrong.path))


def _doubts(predictions: Predictions) -> Iterator[tuple[str, str, str, float, float]]:
    """Give path, label, predicted class and both probabilities of the images that count as of another class."""
    assert predictions.prob_target is not None
    assert predictions.prob_predicted is not None
    names, places = np.unique(predictions.targets, return_inverse=True)
    means = np.bincount(places, predictions.prob_target) / np.bincount(places)
    usual = dict(zip(names.tolist(), means.tolist(), strict=True))
    rows = zip(
        predictions.paths,
        predictions.targets,
        predictions.predicted,
        predictions.prob_target.tolist(),
        predictions.prob_predicted.tolist(),
        strict=True,
    )
    for path, label, predicted, prob_label, prob_predicted in rows:
        if predicted != label and prob_predicted >= usual.get(predicted, 1.0):
            yield path, label, predicted, prob_label, prob_predicted
