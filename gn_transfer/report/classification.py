"""What the page of a run says of a classification: accuracy, classes, confusions, errors, calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gn_transfer.report.calibration import Calibration, calibration, wilson_interval
from gn_transfer.report.evaluation import (
    ClassScore,
    Mistake,
    class_names,
    class_scores,
    confused_pairs,
    confusion,
    mistakes,
)
from gn_transfer.report.images import find_image, thumbnail
from gn_transfer.report.predictions import Predictions, SplitPredictions
from gn_transfer.report.runs import Run
from gn_transfer.report.sentences import MOST_IMAGES, about_test, images_said, percent, reached

_MOST_CLASSES = 30  # a larger matrix is read by nobody; the most frequent confusions say it
_MOST_PAIRS = 10
_HINTS = {
    "images": "Validation images of the class.",
    "recall %": "Share of the images of the class that were given it: its accuracy.",
    "precision %": "Share of the images given this class that belong to it.",
    "F1 %": "Harmonic mean of precision and recall.",
    "test recall %": "The recall on the test images.",
    "taken for": "The class that its other images were given most often, and how many of them.",
}


class _Cell(NamedTuple):
    """A cell of the confusion matrix."""

    images: int
    share: str
    right: bool
    said: str


def classification_parts(
    run: Run, validation: SplitPredictions | None, test: SplitPredictions | None, roots: list[Path]
) -> dict[str, Any]:
    """Give what the template shows of a classification.

    Args:
        run: The run.
        validation: Its predictions on the validation images, by the weights of best.ckpt; None where not stored.
        test: Those on the test images; None where it was not tested.
        roots: Where the images may be.
    """
    validation = validation if isinstance(validation, Predictions) else None
    test = test if isinstance(test, Predictions) else None
    found = None if validation is None else calibration(validation)
    scores = [] if validation is None else class_scores(validation)
    names = [] if validation is None else class_names(validation)
    worst, confident = _two_kinds([] if validation is None else mistakes(validation))
    return {
        "answer": answer(run, validation, test, scores, found),
        "calibration": found,
        "scores": list(_score_rows(scores, test)),
        "scores_said": f"{images_said(validation, test, 'test recall')} The class with the lowest recall comes first.",
        "hints": _HINTS,
        "names": names,
        "matrix": _matrix(validation) if validation is not None and len(names) <= _MOST_CLASSES else [],
        "confused": _pair_rows(validation),
        "worst": [(mistake, thumbnail(find_image(mistake.path, roots))) for mistake in worst],
        "confident": [(mistake, thumbnail(find_image(mistake.path, roots))) for mistake in confident],
    }


def answer(
    run: Run,
    validation: Predictions | None,
    test: Predictions | None,
    scores: Sequence[ClassScore],
    found: Calibration | None,
) -> list[str]:
    """Say in sentences what a run reached.

    Args:
        run: The run.
        validation: Its predictions on the validation images, by the weights of best.ckpt; None where not stored.
        test: Those on the test images; None where it was not tested.
        scores: Of each class on the validation images, the worst first.
        found: The calibration there.

    Returns:
        The accuracy first.
    """
    metrics = run.metrics
    accuracy = float(metrics.get("best/val/acc1", metrics["val/acc1"]))
    tested = metrics.get("test/acc1")
    lines = [
        f"{_share(accuracy, validation)} of the validation images are right{reached(run)}"
        + (f", and {_share(float(tested), test)} of the test images." if tested is not None else ".")
    ]
    if tested is not None:
        lines.append(about_test(run, "accuracy"))
    if scores and scores[0].recall < 1:
        score = scores[0]
        taken = f"; {score.taken_for[1]} were taken for {score.taken_for[0]}" if score.taken_for else ""
        lines.append(
            f"The hardest class is {score.name}: {percent(score.recall)} of {score.images} images are right{taken}."
        )
    elif scores:
        lines.append("No validation image is wrong.")
    if found is not None:
        images = sum(one.images for one in found.bins)
        low, high = wilson_interval(round(found.accuracy * images), images)
        tendency = "overconfident" if found.confidence > high else "underconfident" if found.confidence < low else None
        said = "The confidence fits the accuracy" if tendency is None else f"The model is {tendency}"
        lines.append(
            f"{said}: mean confidence {percent(found.confidence)}, accuracy "
            f"{percent(found.accuracy)}, expected calibration error {100 * found.error:.1f} points."
        )
    return lines


def _two_kinds(wrong: Sequence[Mistake]) -> tuple[list[Mistake], list[Mistake]]:
    """Choose the worst errors, and the most confident of the others."""
    worst = list(wrong[:MOST_IMAGES])
    rest = [mistake for mistake in wrong[MOST_IMAGES:] if mistake.prob_predicted is not None]
    return worst, sorted(rest, key=lambda mistake: -(mistake.prob_predicted or 0))[:MOST_IMAGES]


def _score_rows(scores: Sequence[ClassScore], test: Predictions | None) -> Iterator[dict[str, str]]:
    tested = {} if test is None else {score.name: score for score in class_scores(test)}
    for score in scores:
        row = {
            "class": score.name,
            "images": f"{score.images:,}",
            "recall %": f"{100 * score.recall:.1f}",
            "precision %": f"{100 * score.precision:.1f}",
            "F1 %": f"{100 * score.f1:.1f}",
        }
        if tested:
            row["test recall %"] = f"{100 * tested[score.name].recall:.1f}" if score.name in tested else "-"
        yield row | {"taken for": "-" if score.taken_for is None else f"{score.taken_for[0]} ({score.taken_for[1]})"}


def _matrix(predictions: Predictions) -> list[tuple[str, list[_Cell]]]:
    names, counts = class_names(predictions), confusion(predictions)
    rows = []
    for place, name in enumerate(names):
        total = max(1, int(counts[place].sum()))
        cells = [
            _Cell(
                count,
                f"{count / total:.2f}",
                place == column,
                f"{count} of {total} images of {name} ({count / total:.0%}) were "
                + ("recognized" if place == column else f"taken for {names[column]}"),
            )
            for column, count in enumerate(counts[place].tolist())
        ]
        rows.append((name, cells))
    return rows


def _pair_rows(predictions: Predictions | None) -> list[dict[str, str]]:
    pairs = [] if predictions is None else confused_pairs(predictions, _MOST_PAIRS)
    return [{"class": target, "taken for": predicted, "images": str(count)} for target, predicted, count in pairs]


def _share(accuracy: float, predictions: Predictions | None) -> str:
    """Write an accuracy with its interval, which needs the number of images."""
    if predictions is None:
        return percent(accuracy)
    right, images = int(predictions.correct.sum()), len(predictions.paths)
    low, high = wilson_interval(right, images)
    return f"{percent(right / images)} [{100 * low:.1f}, {100 * high:.1f}] ({right:,} of {images:,})"
