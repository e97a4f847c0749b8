"""What the pages of all tasks say in the same words."""

from __future__ import annotations

import math

from gn_transfer.config import printable
from gn_transfer.report.predictions import SplitPredictions
from gn_transfer.report.runs import Run

MOST_IMAGES = 12
"""Errors of a kind that the page shows."""


def about_test(run: Run, metric: str) -> str:
    """Say which figure to trust, and of which checkpoint it is.

    Args:
        run: A run that was tested.
        metric: What the figure is, in words.
    """
    tested = str(run.metrics.get("test/checkpoint", "best.ckpt"))
    if tested == "best.ckpt":
        return (
            "The test images give the honest figure: best.ckpt was chosen by the validation images, so that its "
            f"{metric} there is a little too high."
        )
    return (
        f"The figure of the test images is that of {printable(tested)}, and that of the validation images is that of "
        "best.ckpt: do not compare the two."
    )


def reached(run: Run) -> str:
    """Say in which epoch the best checkpoint was reached; empty where that is not known."""
    epoch, planned = run.metrics.get("best/epoch"), run.settings.get("trainer.max_epochs")
    epochs = run.metrics.get("epochs") if run.metrics["status"] == "finished" or not planned else planned
    return "" if epoch is None else f" after epoch {epoch} of {epochs}"


def images_said(validation: SplitPredictions | None, test: SplitPredictions | None, name: str) -> str:
    """Say how many images the figures of a table are about.

    Args:
        validation: Predictions on the validation images.
        test: Those on the test images.
        name: What the table calls the figure on the test images.
    """
    said = (
        ""
        if validation is None
        else f"On the {len(validation.paths):,} validation images, with the weights of best.ckpt."
    )
    return said if test is None else f"{said} The {name} is on the {len(test.paths):,} test images."


def percent(share: float) -> str:
    """Write a share in percent, never broken over two lines."""
    return "-" if not math.isfinite(share) else f"{100 * share:.1f}\u00a0%"
