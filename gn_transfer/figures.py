"""Figures: a confusion matrix, a grid of pictures. numpy and matplotlib only."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure


def confusion_figure(counts: np.ndarray, classes: list[str]) -> Figure:
    """Draw a confusion matrix.

    Args:
        counts: Pictures of class i (row) predicted as class j (column), shape ``(C, C)``.
        classes: Their names.

    Returns:
        Rows scaled to 1 by colour; counts are written in up to 20 classes.
    """
    number = len(classes)
    size = min(14.0, 3.0 + 0.35 * number)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xticks(range(number), classes, rotation=90 if number > 6 else 30, ha="right" if number <= 6 else "center")
    axes.set_yticks(range(number), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if number <= 20:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def picture_grid(pictures: list[tuple[np.ndarray, str]], columns: int = 4) -> Figure:
    """Draw pictures with a caption each.

    Args:
        pictures: Pixels uint8 ``(H, W, 3)`` and the text above them.
        columns: Pictures in a row.

    Returns:
        The figure.
    """
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    for place, (pixels, caption) in enumerate(pictures, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(pixels)
        axes.set_title(caption, fontsize=7)
        axes.set_axis_off()
    return figure
