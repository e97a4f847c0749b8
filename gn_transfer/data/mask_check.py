"""Are the masks of a data set sound? Decode all, and look for what would stop or spoil a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import BadImageError
from gn_transfer.data.masks import about_turned, check_masks, first_of, turned_images
from gn_transfer.data.segmentation import SegmentationDataModule


@dataclass
class MaskCheckResult:
    """What a check of masks found.

    Attributes:
        pixels: Labeled pixels by split and class.
        bad: Path and reason of each mask that cannot be used.
        problems: What would stop a training, one sentence each.
        warnings: What may spoil it.
    """

    pixels: dict[str, dict[str, int]] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Give the report as plain values."""
        return {
            "labeled_pixels": self.pixels,
            "bad_masks": [{"path": path, "error": reason} for path, reason in self.bad],
        }


def check_split_masks(
    data: SegmentationDataModule,
    splits: Mapping[str, Sequence[LabeledImage]],
    *,
    threads: int,
    advance: Callable[[], object] = lambda: None,
) -> MaskCheckResult:
    """Check the masks of all splits.

    Args:
        data: The data module, its images listed.
        splits: The images by split, those for training first; ``unlisted`` have no masks.
        threads: How many at a time, >= 1.
        advance: Called after every mask.

    Returns:
        The report.
    """
    values, report = data.mask_values(), MaskCheckResult()
    empty: list[str] = []
    turned: list[str] = []
    single = 0
    for split, images in splits.items():
        if split == "unlisted":
            continue
        found = check_masks(Path(data.root), images, values, threads=threads, advance=advance)
        turned += turned_images(Path(data.root), images, threads=threads)
        total = np.zeros(len(values.classes), np.int64)
        for image, counts in zip(images, found, strict=True):
            if isinstance(counts, BadImageError):
                report.bad.append((image.mask, counts.reason))
                continue
            total += counts
            single += int((counts > 0).sum() == 1)
            if not counts.any():
                empty.append(image.mask)
        report.pixels[split] = dict(zip(values.classes, total.tolist(), strict=True))
    if report.bad and data.on_bad_image == "raise":
        report.problems.append(
            f"{len(report.bad):,} masks cannot be used; repair them, or leave the images out with "
            "--data.on_bad_image skip."
        )
    for place, (split, per_class) in enumerate(report.pixels.items()):
        missing = [name for name, count in per_class.items() if count == 0]
        if missing and place == 0:
            report.problems.append(data.complain_of_missing(missing, splits[split]))
        elif missing:
            report.warnings.append(f"no mask of {split} has a pixel of {', '.join(missing)}; its IoU is not measured.")
    if empty:
        report.warnings.append(f"{len(empty):,} masks have no labeled pixel and teach nothing: {first_of(empty)}.")
    if turned:
        report.warnings.append(about_turned(turned))
    if single:
        total_masks = sum(len(some) for split, some in splits.items() if split != "unlisted")
        report.warnings.append(f"{single:,} of {total_masks:,} masks hold one class only.")
    return report
