"""Figures of one run: its curves and its calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gn_transfer.report.calibration import BINS, Calibration
from gn_transfer.report.runs import MAIN_METRICS
from gn_transfer.report.svg import COLORS, INK, STYLE, PageFigure, as_svg, hover

_SIZE = (5.2, 3.3)
_TRAINING, _VALIDATION = COLORS[1], COLORS[0]
_CURVES = {
    "acc1": {"val/acc1": "accuracy over images", "val/acc_per_class": "accuracy over classes"},
    "miou": {"val/miou": "mean IoU", "val/dice": "Dice", "val/pixel_acc": "accuracy over pixels"},
}
_TRAINING_LOSS = {
    "acc1": "with label smoothing and mixing where they are set",
    "miou": "with class weights and Dice where they are set",
}


def create_figures(
    epochs: Sequence[dict[str, float]], best_epoch: int | None, metric: str, found: Calibration | None
) -> list[PageFigure]:
    """Create the figures of a run.

    Args:
        epochs: The rows of its epochs.csv.
        best_epoch: The epoch of best.ckpt.
        metric: Metric of the task, ``acc1`` or ``miou``.
        found: Calibration on the validation images; None where it is not known.

    Returns:
        Those that there is something to show in.
    """
    figures = []
    with matplotlib.rc_context(STYLE):
        if epochs:
            figures.append(
                PageFigure(
                    "metric",
                    {"acc1": "Accuracy", "miou": "Mean IoU"}[metric],
                    as_svg(_metric(epochs, best_epoch, metric), "metric"),
                    f"The {MAIN_METRICS[metric]} on the validation images after each epoch. "
                    + ("The ring marks the epoch of best.ckpt." if best_epoch is not None else ""),
                )
            )
            figures.append(
                PageFigure(
                    "loss",
                    "Loss",
                    as_svg(_loss(epochs), "loss"),
                    "Mean loss of each epoch. The training loss is taken on augmented images while the model changes, "
                    f"{_TRAINING_LOSS[metric]}; the validation loss is plain cross entropy.",
                )
            )
        if found is not None:
            figures.append(
                PageFigure(
                    "calibration",
                    "Calibration",
                    as_svg(_calibration(found), "calibration"),
                    f"Accuracy against confidence, the probability of the predicted class, in {BINS} intervals of "
                    "equal width; bars are 95 % intervals (Wilson), the area of a point grows with its images. Below "
                    "the diagonal the model claims more than it reaches.",
                )
            )
    return figures


_LARGEST_VALUE = 1e100  # of what can be drawn
MOST_POINTS = 300  # of a curve; its line has all


def _metric(epochs: Sequence[dict[str, float]], best_epoch: int | None, metric: str) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for (name, said), color in zip(_CURVES[metric].items(), (COLORS[0], COLORS[2], COLORS[1]), strict=False):
        _curve(axes, epochs, name, said, color, lambda value: f"{100 * value:.1f} %", 100)
    for row in epochs:
        if row["epoch"] == best_epoch and f"val/{metric}" in row:
            axes.plot([row["epoch"]], [100 * row[f"val/{metric}"]], "o", mfc="none", mec=INK, ms=11, mew=1.2)
    axes.set_ylabel("on the validation images, %")
    _finish(axes)
    return figure


def _loss(epochs: Sequence[dict[str, float]]) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for name, said, color in (("train/loss", "training loss", _TRAINING), ("val/loss", "validation loss", _VALIDATION)):
        _curve(axes, epochs, name, said, color, lambda value: f"{value:.4g}", 1)
    axes.set_ylabel("loss")
    _finish(axes)
    return figure


def _curve(
    axes: Axes,
    epochs: Sequence[dict[str, float]],
    name: str,
    said: str,
    color: str,
    written: Callable[[float], str],
    scale: float,
) -> None:
    points = [(row["epoch"], row[name]) for row in epochs if abs(row.get(name, math.nan)) < _LARGEST_VALUE]
    axes.plot([epoch for epoch, _ in points], [scale * value for _, value in points], color=color, label=said)
    for epoch, value in points[:: 1 + len(points) // MOST_POINTS]:
        [point] = axes.plot([epoch], [scale * value], "o", color=color, markersize=4.5)
        hover(point, f"epoch {epoch:g}: {said} {written(value)}")


def _finish(axes: Axes) -> None:
    first, last = axes.get_xlim()
    if last - first < 1:  # a single epoch
        axes.set_xlim(first - 0.5, last + 0.5)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _calibration(found: Calibration) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 100], [0, 100], "--", color=INK, alpha=0.5, linewidth=1)
    most = max(part.images for part in found.bins)
    for part in found.bins:
        x, y = 100 * part.confidence, 100 * part.accuracy
        axes.plot([x, x], [100 * part.low, 100 * part.high], color=COLORS[0], linewidth=1.6)
        [point] = axes.plot([x], [y], "o", color=COLORS[0], markersize=4 + 8 * math.sqrt(part.images / most))
        hover(
            point,
            f"{part.images:,} images: confidence {x:.1f} %, accuracy {y:.1f} % "
            f"[{100 * part.low:.1f}, {100 * part.high:.1f}]",
        )
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(-2, 102)
    axes.set_ylim(-2, 104)
    return figure
