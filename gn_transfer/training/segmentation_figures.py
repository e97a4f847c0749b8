"""What TensorBoard shows of a segmentation: training pairs, and the images that were segmented worst."""

from __future__ import annotations

import heapq

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from gn_transfer.data import ImageDataModule
from gn_transfer.data.contact_sheet import Line, contact_sheet
from gn_transfer.data.overlay import legend, mark_errors, overlay, square
from gn_transfer.data.sampler import epoch_order
from gn_transfer.training.pixel_counts import count_pixels, mean_iou
from gn_transfer.training.task import WORST

_SIDE = 192  # of an image on a sheet, in pixels


def training_pairs(data: ImageDataModule, count: int) -> np.ndarray:
    """Show the first training images of epoch 0 as the model sees them, with their masks laid over them.

    Args:
        data: Set up for fit.
        count: How many to show.

    Returns:
        Pixels uint8, shape ``(H, W, 3)``.
    """
    dataset, sampler = data.train_dataset, data.train_sampler
    order = epoch_order(len(dataset), sampler.seed, 0, sampler.shuffle)[:count]
    images, targets = dataset.batch([(0, index) for index in order])
    tiles = []
    for image, target in zip(images, targets.numpy(), strict=True):
        present = {number: name for number, name in enumerate(data.classes) if (target == number).any()}
        colors = legend(present, len(data.classes))
        tiles.append((overlay(_pixels(image), target, len(data.classes)), colors))
    return contact_sheet(tiles)


class SegmentationFigures:
    """The images with the lowest IoU, of those that this process evaluates: image, truth, prediction, errors.

    Args:
        classes: Their names.
        worst: How many images to show.
    """

    def __init__(self, classes: list[str], worst: int = 6) -> None:
        self.classes = classes
        self.worst = worst
        self._heap: list[tuple[float, int, np.ndarray, np.ndarray, np.ndarray]] = []
        self._serial = 0

    def update(self, logits: Tensor, images: Tensor, targets: Tensor) -> None:
        """Keep the worst images so far."""
        preds = logits.argmax(1)
        counts = count_pixels(preds, targets.long(), len(self.classes)).t().tolist()
        arrays = zip(images, preds.byte().cpu().numpy(), targets.cpu().numpy(), counts, strict=True)
        for image, pred, target, of_image in arrays:
            miou = mean_iou(of_image)
            if miou is None:
                continue
            entry = (-miou, self._serial, _pixels(image), pred, target)
            self._serial += 1
            if len(self._heap) < self.worst:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)

    def draw(self) -> tuple[dict[str, Figure], dict[str, np.ndarray]]:
        """Draw a row for every image."""
        tiles: list[tuple[np.ndarray, list[Line]]] = []
        for negative, _, image, pred, target in sorted(self._heap, reverse=True, key=lambda entry: entry[0]):
            number = len(self.classes)
            for caption, view, classes in (
                (f"mean IoU {-negative:.2f}", image, None),
                ("truth", overlay(image, target, number), target),
                ("prediction", overlay(image, pred, number), pred),
                ("errors", mark_errors(image, pred, target), None),
            ):
                present = {} if classes is None else {n: c for n, c in enumerate(self.classes) if (classes == n).any()}
                tiles.append((square(view, _SIDE), [caption, *legend(present, number)]))
        return {}, {WORST: contact_sheet(tiles, columns=4)} if tiles else {}


def _pixels(image: Tensor) -> np.ndarray:
    """Shape ``(H, W, 3)``; a grey image too."""
    return image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy().copy()
