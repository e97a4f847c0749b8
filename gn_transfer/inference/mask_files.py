"""Predicted masks as files: index PNGs, in colors, that a segmentation can be trained on. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gn_transfer.config import ConfigError
from gn_transfer.data.overlay import class_colors
from gn_transfer.inference.segmentation import Segmentation


class MaskWriter:
    """Write the masks of images into a folder, under the names of the images.

    Args:
        folder: A new or empty folder; folders of images are repeated in it.
        images: Paths of all images.

    Raises:
        ConfigError: The folder holds something, which could be masks made by hand, or two images would have one mask.
    """

    def __init__(self, folder: Path, images: Sequence[str]) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--masks {folder} exists and is not an empty folder; name a new one.")
        folders = [os.path.dirname(os.path.abspath(image)) for image in images]  # noqa: PTH100, PTH120
        common = os.path.commonpath(folders) if folders else ""
        self._files: dict[str, Path] = {}
        taken: dict[Path, str] = {}
        for image in images:
            file = folder / Path(os.path.relpath(os.path.abspath(image), common)).with_suffix(".png")  # noqa: PTH100
            if file in taken:
                raise ConfigError(
                    f"--masks: {taken[file]} and {image} would have one mask, {file}; rename one of them."
                )
            self._files[image] = file
            taken[file] = image

    def write(self, segmentation: Segmentation) -> None:
        """Write the mask of an image: a PNG whose values are positions in the classes, shown in their colors."""
        assert segmentation.path is not None
        file = self._files[segmentation.path]
        file.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.fromarray(segmentation.mask)
        mask.putpalette(class_colors(len(segmentation.classes)).tobytes())
        mask.save(file, bits=8)  # Pillow would pack few classes into fewer bits
