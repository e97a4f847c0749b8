"""Does a bundle compute what was trained? Both see the validation images of the run, from the files on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

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

Counts = npt.NDArray[np.int64]
Evaluated: TypeAlias = Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.integer]]]
"""Logits and target of each validation image, in their order."""


@dataclass(frozen=True)
class Parity:
    """How far a bundle is from its checkpoint, over the validation images of the run.

    Attributes:
        images: How many were compared.
        max_difference: Greatest absolute difference of a logit.
        max_logit: Greatest absolute logit of the checkpoint.
        tolerance: What :attr:`max_difference` may be.
        compared: Images, or labeled pixels of them.
        same_class: Those of them with the same top class. Where the difference is within the tolerance, only classes
            whose logits are closer than twice the tolerance can differ.
        metric: ``accuracy`` or ``mIoU``.
        metric_checkpoint: Its value for the checkpoint in torch.
        metric_bundle: Its value for the bundle.
    """

    images: int
    max_difference: float
    max_logit: float
    tolerance: float
    compared: int
    same_class: int
    metric: str
    metric_checkpoint: float
    metric_bundle: float

    @property
    def holds(self) -> bool:
        """Whether the bundle computes what was trained."""
        return self.max_difference <= self.tolerance

    def summary(self) -> str:
        """Say it in a line."""
        equal = (
            f"{self.same_class}"
            if self.compared == self.images
            else f"{self.same_class / max(1, self.compared):.4%} of the labeled pixels"
        )
        return (
            f"{self.images} validation images: logits differ by at most {self.max_difference:.1e} (allowed "
            f"{self.tolerance:.1e}), top class equal on {equal}, {self.metric} {self.metric_bundle:.4f} "
            f"(checkpoint {self.metric_checkpoint:.4f})"
        )


class ParityError(RuntimeError):
    """A bundle does not compute what was trained: a fault of the program, or of the libraries it exports with."""


class ParityMeter:
    """Compare a bundle with its checkpoint, image by image.

    Args:
        num_classes: Number of classes.

    Attributes:
        confusion: Images, or labeled pixels, of each class (rows) that the bundle gave each class (columns).
        logits: Those of the bundle, of each image; empty for segmentations, whose logits are large.
        targets: True class of each image; empty likewise.

    Example:
        >>> meter = ParityMeter(2)
        >>> for logits, target in (([1.0, 3.0], 1), ([2.0, 0.5], 1)):
        ...     of_checkpoint = np.array(logits, np.float32)
        ...     meter.update(of_checkpoint, of_checkpoint + 1e-5, np.array(target))
        >>> parity = meter.compute()
        >>> parity.holds, parity.same_class, parity.metric, parity.metric_bundle
        (True, 2, 'accuracy', 0.5)
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion: Counts = np.zeros((num_classes, num_classes), np.int64)
        self.logits: list[npt.NDArray[np.float32]] = []
        self.targets: list[int] = []
        self._of_checkpoint = self.confusion.copy()
        self._images = self._same = 0
        self._difference = self._largest = 0.0
        self._of_pixels = False

    def update(
        self,
        of_checkpoint: npt.NDArray[np.float32],
        of_bundle: npt.NDArray[np.float32],
        target: npt.NDArray[np.integer],
    ) -> None:
        """Take the logits of an image.

        Args:
            of_checkpoint: Shape ``(classes,)``, or ``(classes, H, W)`` of a segmentation.
            of_bundle: Likewise; what is not finite differs by infinity.
            target: True class, or classes of shape ``(H, W)``; numbers that are no class do not count.

        Raises:
            ConfigError: The checkpoint's logits are not finite.
        """
        if not np.isfinite(of_checkpoint).all():
            raise ConfigError(
                "the checkpoint's logits are not finite on its validation images; use another checkpoint."
            )
        difference = float(np.abs(of_checkpoint - of_bundle).max())
        self._difference = max(self._difference, difference if np.isfinite(difference) else float("inf"))
        self._largest = max(self._largest, float(np.abs(of_checkpoint).max()))
        number = len(self.confusion)
        counts = target < number
        preds = [logits.argmax(0)[counts] for logits in (of_checkpoint, of_bundle)]
        for confusion, pred in zip((self._of_checkpoint, self.confusion), preds, strict=True):
            pairs = target[counts].astype(np.int64) * number + pred
            confusion += np.bincount(pairs, minlength=number**2).reshape(number, number)
        self._same += int((preds[0] == preds[1]).sum())
        self._images += 1
        self._of_pixels = target.ndim > 0
        if not self._of_pixels:
            self.logits.append(of_bundle)
            self.targets.append(int(target))

    def compute(self) -> Parity:
        """Give the comparison of all images so far."""
        measure = mean_iou if self._of_pixels else accuracy
        return Parity(
            images=self._images,
            max_difference=self._difference,
            max_logit=self._largest,
            tolerance=TOLERANCE * max(1.0, self._largest),
            compared=int(self.confusion.sum()),
            same_class=self._same,
            metric="mIoU" if self._of_pixels else "accuracy",
            metric_checkpoint=measure(self._of_checkpoint),
            metric_bundle=measure(self.confusion),
        )


def accuracy(confusion: Counts) -> float:
    """Compute the share of right classes from a confusion matrix."""
    return float(np.trace(confusion) / confusion.sum())


def class_ious(confusion: Counts) -> npt.NDArray[np.float64]:
    """Compute the intersection over union of every class; nan where it neither occurs nor was given."""
    inside = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - inside
    return np.where(union > 0, inside / np.maximum(union, 1), np.nan)


def mean_iou(confusion: Counts) -> float:
    """Compute the mean of :func:`class_ious` over the classes that occur or were given."""
    return float(np.nanmean(class_ious(confusion)))


def compare_with_checkpoint(
    evaluated: Evaluated, bundles: Sequence[Bundle], data: ImageDataModule
) -> list[ParityMeter]:
    """Run bundles over the validation images, from the files on: decoding and preprocessing are compared as well.

    Args:
        evaluated: What :func:`evaluate_checkpoint` gave for these images.
        bundles: The bundles.
        data: Set up for validation.

    Returns:
        The comparison of each bundle.

    Raises:
        ConfigError: The checkpoint's logits are not finite.
    """
    images = data.val_dataset.images
    meters = [ParityMeter(len(bundle.classes)) for bundle in bundles]
    paths = [data.val_dataset.root / image.path for image in images]
    predictions = zip(*(bundle.iter_predict(paths) for bundle in bundles), strict=True)
    with progress_bar("comparing with the checkpoint", len(images)) as advance:
        for (logits, target), of_bundles in zip(evaluated, predictions, strict=True):
            for meter, prediction in zip(meters, of_bundles, strict=True):
                if isinstance(prediction, BadImageError):
                    raise prediction
                meter.update(logits, prediction.logits, target)
            advance()
    return meters


def evaluate_checkpoint(task: TransferTask, data: ImageDataModule) -> Evaluated:
    """Give logits and target of every validation image, in their order.

    Args:
        task: The checkpoint's module, in evaluation mode.
        data: Set up for validation.

    Yields:
        Shapes ``(classes,)`` and ``()``, or ``(classes, H, W)`` and ``(H, W)`` of a segmentation.
    """
    for batch, targets in data.val_dataloader():
        with torch.inference_mode():
            logits = task(batch).float().numpy()
        yield from zip(logits, targets.numpy(), strict=True)
