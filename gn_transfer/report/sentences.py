"""What the pages of all tasks say in the same words."""

from __future__ import annotations

import math

from gn_transfer.report.predictions import SplitPredictions
from gn_transfer.report.runs import Run

MOST_IMAGES = 12
"""Errors of a kind that the page shows."""

TEST_IS_HONEST = (
    "The test images give the honest figure: best.ckpt was chosen by the validation images, so that its {metric} there "
    "is a little too high."
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
