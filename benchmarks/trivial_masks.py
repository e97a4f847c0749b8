"""What a segmentation without a model reaches: every pixel background, and the mean mask of the training images.

The mean mask gives each place of an image, relative to its sides, the class that training images most often have there.
Both are measured on the test images as a run measures its model: at `short_side`, without the border, mean IoU over
classes, with an interval over images.

    python benchmarks/trivial_masks.py --data_root PATH --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer import PetsSegmentation
from gn_transfer.data.masks import IGNORED
from gn_transfer.data.segmentation import SegmentationDataset
from gn_transfer.report.predictions import PixelPredictions
from gn_transfer.training.environment import environment

SIDE = 128
"""Side of the mean mask."""

Mask: TypeAlias = npt.NDArray[np.uint8]


def targets(dataset: SegmentationDataset) -> list[Mask]:
    """Give the targets of all images, whole, each of shape ``(H, W)``."""
    return [dataset.batch([index])[1][0].numpy() for index in range(len(dataset))]


def mean_mask(masks: Sequence[Mask], classes: int) -> npt.NDArray[np.float32]:
    """Count how often each class is at each place, shape ``(SIDE, SIDE, classes)``, of the pixels that count."""
    total = np.zeros((SIDE, SIDE, classes), np.float32)
    for mask_HW in masks:
        one_hot_HWC = np.stack([mask_HW == number for number in range(classes)], axis=2).astype(np.float32)
        total += cv2.resize(one_hot_HWC, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return total


def score(
    predict: Callable[[Mask], Mask], names: Sequence[str], masks: Sequence[Mask], paths: list[str]
) -> dict[str, Any]:
    """Measure a prediction that sees only the size of an image."""
    counts = np.zeros((3, len(masks), len(names)))
    for row, mask_HW in enumerate(masks):
        predicted_HW = predict(mask_HW)
        for number in range(len(names)):
            true, given = mask_HW == number, (predicted_HW == number) & (mask_HW != IGNORED)
            counts[:, row, number] = (true & given).sum(), (true | given).sum(), true.sum()
    found = PixelPredictions(paths, list(names), *counts)
    return {"miou": found.value, "interval": found.interval(), "iou": found.by_class(set(paths))}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both on the test images."""
    data = PetsSegmentation(options.data_root, img_size=options.img_size, seed=options.seed, val_fraction=0.2)
    data.setup("fit")
    train = SegmentationDataset(
        Path(data.root), data.train_dataset.images, options.img_size, data.values, data.resolved_short_side
    )
    training = targets(train)
    data.setup("test")
    assert isinstance(data.test_dataset, SegmentationDataset)
    masks, paths = targets(data.test_dataset), [image.path for image in data.test_dataset.images]
    mean = mean_mask(training, len(data.classes))
    background = data.classes.index("background")

    def at_its_place(mask_HW: Mask) -> Mask:
        likeliest_HW = cv2.resize(mean, mask_HW.shape[::-1], interpolation=cv2.INTER_LINEAR).argmax(2)
        return np.asarray(likeliest_HW, np.uint8)

    return {
        "training_images": len(training),
        "test_images": len(masks),
        "all background": score(lambda mask: np.full_like(mask, background), data.classes, masks, paths),
        "mean mask": score(at_its_place, data.classes, masks, paths),
        **environment(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of the split into training and validation")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    result = measure(options)
    for name in ("all background", "mean mask"):
        low, high = result[name]["interval"]
        print(f"{name:<15} mIoU {100 * result[name]['miou']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    if options.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
