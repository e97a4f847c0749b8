"""What the page of a run says of a segmentation: mean IoU, classes, the images that were segmented worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gn_transfer.report.images import find_image, sheet_address, thumbnail
from gn_transfer.report.predictions import PixelPredictions, SplitPredictions
from gn_transfer.report.runs import Run
from gn_transfer.report.sentences import MOST_IMAGES, about_test, images_said, percent, reached

_HINTS = {
    "IoU %": "Intersection over union: pixels of the class that were given it, of all that belong to it or were given "
    "it.",
    "recall %": "Share of the pixels of the class that were given it.",
    "precision %": "Share of the pixels given this class that belong to it.",
    "pixels %": "Share of the labeled pixels that belong to the class.",
    "test IoU %": "The IoU on the test images.",
}


def segmentation_parts(
    run: Run, validation: SplitPredictions | None, test: SplitPredictions | None, roots: list[Path]
) -> dict[str, Any]:
    """Give what the template shows; see :func:`gn_transfer.report.classification.classification_parts`."""
    validation = validation if isinstance(validation, PixelPredictions) else None
    test = test if isinstance(test, PixelPredictions) else None
    return {
        "answer": answer(run, validation, test),
        "scores": [] if validation is None else _score_rows(validation, test),
        "scores_said": f"{images_said(validation, test, 'test IoU')} The class with the lowest IoU comes first.",
        "hints": _HINTS,
        "worst_sheet": sheet_address(run.folder / "worst_images.jpg"),
        "low_images": [] if validation is None else _low_images(validation, roots),
    }


def answer(run: Run, validation: PixelPredictions | None, test: PixelPredictions | None) -> list[str]:
    """Say in sentences what a run reached.

    Args:
        run: The run.
        validation: Its predictions on the validation images, by the weights of best.ckpt; None where not stored.
        test: Those on the test images; None where it was not tested.

    Returns:
        The mean IoU first.
    """
    metrics = run.metrics
    tested = metrics.get("test/miou")
    lines = [
        f"The mean IoU on the validation images is "
        f"{_with_interval(float(metrics.get('best/val/miou', metrics['val/miou'])), validation)}{reached(run)}"
        + (f", and {_with_interval(float(tested), test)} on the test images." if tested is not None else ".")
    ]
    if tested is not None:
        lines.append(about_test(run, "mean IoU"))
    if validation is not None:
        name, lowest = min(validation.by_class(set(validation.paths)).items(), key=lambda item: item[1])
        lines += [
            f"The hardest class is {name}, with an IoU of {percent(lowest)}.",
            f"A model that gives every pixel the most frequent class would reach {percent(validation.guess)}.",
        ]
    return lines


def _score_rows(validation: PixelPredictions, test: PixelPredictions | None) -> list[dict[str, str]]:
    ious = validation.by_class(set(validation.paths))
    tested = {} if test is None else test.by_class(set(test.paths))
    inside, union, pixels = (counts.sum(0) for counts in (validation.intersection, validation.union, validation.pixels))
    given = union - pixels + inside
    rows = []
    for place in sorted(range(len(validation.classes)), key=lambda place: ious.get(validation.classes[place], np.inf)):
        name = validation.classes[place]
        row = {
            "class": name,
            "IoU %": _hundred(ious.get(name)),
            "recall %": _hundred(inside[place] / pixels[place] if pixels[place] else None),
            "precision %": _hundred(inside[place] / given[place] if given[place] else None),
            "pixels %": _hundred(pixels[place] / pixels.sum()),
        }
        rows.append(row | ({} if test is None else {"test IoU %": _hundred(tested.get(name))}))
    return rows


def _low_images(validation: PixelPredictions, roots: list[Path]) -> list[tuple[str, str, str | None]]:
    """Give path, IoU and thumbnail of the images with the lowest IoU; those without a labeled pixel have none."""
    labeled = ~np.isnan(validation.image_ious)
    order = np.argsort(validation.image_ious, kind="stable")[: min(MOST_IMAGES, labeled.sum())]  # nan comes last
    paths = [(validation.paths[place], float(validation.image_ious[place])) for place in order]
    return [(path, percent(iou), thumbnail(find_image(path, roots))) for path, iou in paths]


def _with_interval(value: float, predictions: PixelPredictions | None) -> str:
    if predictions is None:
        return percent(value)
    low, high = predictions.interval()
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}] ({len(predictions.paths):,} images)"


def _hundred(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
