"""Does a bundle compute what was trained? Both see the validation images of the run, from the files on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gn_transfer.config import ConfigError
from gn_transfer.data import ImageDataModule
from gn_transfer.data.decode import BadImageError
from gn_transfer.data.progress import progress_bar
from gn_transfer.inference.bundle import Bundle
from gn_transfer.training.task import TransferTask

TOLERANCE = 1e-4
"""Greatest difference of a logit, absolute, or relative to the greatest logit where that exceeds 1."""


@dataclass(frozen=True)
class Parity:
    """How far a bundle is from its checkpoint, over the validation images of the run.

    Attributes:
        images: How many were compared.
        max_difference: Greatest absolute difference of a logit.
        max_logit: Greatest absolute logit of the checkpoint.
        tolerance: What :attr:`max_difference` may be.
        same_class: Images with the same top class.
        decided: Images whose two best logits are more than twice the tolerance apart.
        decided_same_class: Those among them with the same top class.
        accuracy_checkpoint: Share of right top classes, of the checkpoint in torch.
        accuracy_bundle: Share of right top classes, of the bundle.
    """

    images: int
    max_difference: float
    max_logit: float
    tolerance: float
    same_class: int
    decided: int
    decided_same_class: int
    accuracy_checkpoint: float
    accuracy_bundle: float

    @property
    def holds(self) -> bool:
        """Whether the bundle computes what was trained."""
        return self.max_difference <= self.tolerance and self.decided_same_class == self.decided

    def summary(self) -> str:
        """Say it in a line."""
        return (
            f"{self.images} validation images: logits differ by at most {self.max_difference:.1e} (allowed "
            f"{self.tolerance:.1e}), top class equal on {self.same_class}, accuracy {self.accuracy_bundle:.4f} "
            f"(checkpoint {self.accuracy_checkpoint:.4f})"
        )


def measure_parity(
    checkpoint_logits: npt.NDArray[np.float32], bundle_logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> Parity:
    """Compare two sets of logits.

    Args:
        checkpoint_logits: Of the checkpoint in torch, shape ``(N, classes)``.
        bundle_logits: Of the bundle, likewise.
        targets: True classes, shape ``(N,)``.

    Returns:
        The comparison; a bundle whose logits are not finite differs by infinity.

    Example:
        >>> two = np.array([[1.0, 3.0], [2.0, 0.5]], np.float32)
        >>> parity = measure_parity(two, two + 1e-5, np.array([1, 1]))
        >>> parity.holds, parity.same_class, parity.accuracy_bundle
        (True, 2, 0.5)
    """
    difference = float(np.abs(checkpoint_logits - bundle_logits).max())
    largest = float(np.abs(checkpoint_logits).max())
    tolerance = TOLERANCE * max(1.0, largest)
    second, first = np.sort(checkpoint_logits, axis=1)[:, -2:].T
    decided = first - second > 2 * tolerance
    ours, theirs = bundle_logits.argmax(1), checkpoint_logits.argmax(1)
    return Parity(
        images=len(targets),
        max_difference=difference if np.isfinite(difference) else float("inf"),
        max_logit=largest,
        tolerance=tolerance,
        same_class=int((ours == theirs).sum()),
        decided=int(decided.sum()),
        decided_same_class=int((ours == theirs)[decided].sum()),
        accuracy_checkpoint=float((theirs == targets).mean()),
        accuracy_bundle=float((ours == targets).mean()),
    )


class ParityError(RuntimeError):
    """A bundle does not compute what was trained: a fault of the program, or of the libraries it exports with."""


@dataclass(frozen=True)
class Comparison:
    """What a checkpoint and its bundle say about the validation images.

    Attributes:
        parity: How far they are apart.
        targets: True classes, shape ``(N,)``.
        preds: Classes that the bundle predicts, shape ``(N,)``.
    """

    parity: Parity
    targets: npt.NDArray[np.int64]
    preds: npt.NDArray[np.int64]


def compare_with_checkpoint(task: TransferTask, bundle: Bundle, data: ImageDataModule) -> Comparison:
    """Run both over the validation images, from the files on: decoding and preprocessing are compared as well.

    Args:
        task: The checkpoint's module, in evaluation mode.
        bundle: The bundle.
        data: Set up for validation.

    Raises:
        ConfigError: The checkpoint's logits are not finite.
    """
    images = data.val_dataset.images
    logits, predicted = [], []
    with progress_bar("comparing with the checkpoint", 2 * len(images)) as advance, torch.inference_mode():
        for batch, _ in data.val_dataloader():
            logits.append(task(batch).numpy())
            for _ in batch:
                advance()
        ours = np.concatenate(logits)
        if not np.isfinite(ours).all():
            raise ConfigError(
                "the checkpoint's logits are not finite on its validation images; use another checkpoint."
            )
        for prediction in bundle.iter_predict([data.val_dataset.root / image.path for image in images]):
            if isinstance(prediction, BadImageError):
                raise prediction
            predicted.append(prediction.logits)
            advance()
    theirs = np.stack(predicted)
    targets = np.array([image.target for image in images])
    return Comparison(measure_parity(ours, theirs, targets), targets, theirs.argmax(1))
