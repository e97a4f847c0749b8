"""Cutting validation or test from the rest, so that no image stands on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gn_transfer.config import ConfigError
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.duplicates import MOST_COMPARED, group_duplicates
from gn_transfer.data.splits import stratified_split
from gn_transfer.data.workers import core_count


def hold_out(
    images: Sequence[LabeledImage],
    fraction: float,
    seed: int,
    *,
    key: str = "data.val_fraction",
    root: Path | None = None,
) -> tuple[list[LabeledImage], list[LabeledImage]]:
    """Hold out a share of the images of every class; see :func:`gn_transfer.data.splits.stratified_split`.

    Args:
        images: All images.
        fraction: Share that is held out.
        seed: Seed of the choice.
        key: The configuration key of the share, for messages.
        root: Folder of the images where images that show the same are to stay on one side. None does not look at the
            images.

    Returns:
        What stays, and what is held out.

    Raises:
        ConfigError: A share out of range, a class with too few images, or too many to compare.
    """
    paths, targets = [image.path for image in images], [image.target for image in images]
    if root is not None and len(images) > MOST_COMPARED:
        raise ConfigError(
            f"data.group_duplicates compares at most {MOST_COMPARED:,} images, and here are {len(images):,}; leave it "
            "out, and hold out images in a folder of their own, val/ or test/."
        )
    together = [] if root is None else group_duplicates(root, images, core_count())
    kept, held_out = stratified_split(paths, targets, fraction, seed, key=key, together=together)
    return [images[position] for position in kept], [images[position] for position in held_out]
