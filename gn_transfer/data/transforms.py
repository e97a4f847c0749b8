"""Augmentation recipes for training, drawn per sample. Evaluation is in ``preprocess``."""

from __future__ import annotations

import os
import random
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.data.preprocess import preprocess_image

Recipe = Literal["none", "light", "crop_flip"]


class Augmentation:
    """A recipe at one size, whose draws depend on the seed given with each picture alone.

    - ``none``: what evaluation sees.
    - ``light``: the blog's: the whole picture squashed to the square, flip, one hole of up to a quarter of the side.
    - ``crop_flip``: a random crop of 35-100 % of the area, aspect 3/4-4/3, and flip.

    Args:
        recipe: Name of the recipe.
        img_size: Side of the result in pixels.
    """

    def __init__(self, recipe: Recipe, img_size: int) -> None:
        self.recipe = recipe
        self.img_size = img_size
        self._pipeline = None if recipe == "none" else _build(recipe, img_size)

    def __call__(self, image_HWC: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint8]:
        """Augment one picture.

        Args:
            image_HWC: Pixels, shape ``(H, W, 3)``.
            seed: Seed of all draws for this picture.

        Returns:
            Pixels, shape ``(img_size, img_size, 3)``.
        """
        if self._pipeline is None:
            return preprocess_image(image_HWC, self.img_size)
        # set_random_seed would hand every transform its own generator with the same seed, so that they draw the same
        # numbers (small crops would be the flipped ones); one shared state gives independent draws.
        self._pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return np.asarray(self._pipeline(image=image_HWC)["image"], dtype=np.uint8)


def _build(recipe: Recipe, img_size: int) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks a package index for news otherwise
    import albumentations

    size = (img_size, img_size)
    # area_for_downscale: no aliasing, as in evaluation
    resize: dict[str, Any] = {"interpolation": cv2.INTER_LINEAR, "area_for_downscale": "image"}
    transforms: dict[Recipe, list[Any]] = {
        "light": [
            albumentations.Resize(*size, **resize),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.CoarseDropout(
                num_holes_range=(1, 1), hole_height_range=(0.1, 0.25), hole_width_range=(0.1, 0.25), p=0.5
            ),
        ],
        "crop_flip": [
            albumentations.RandomResizedCrop(size, scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3), **resize),
            albumentations.HorizontalFlip(p=0.5),
        ],
    }
    return albumentations.Compose(transforms[recipe])
