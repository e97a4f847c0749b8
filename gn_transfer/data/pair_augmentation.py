"""Augmentation of an image together with its mask."""

from __future__ import annotations

import cv2
import numpy as np

from gn_transfer.config import ConfigError
from gn_transfer.data.augmentation import Pixels, Recipe, SeededPipeline  # before albumentations: it sets a variable
from gn_transfer.data.masks import IGNORED

import albumentations as A  # isort: skip

SCALES = (0.75, 1.5)
"""Factors by which the recipes ``crop_flip`` and ``strong`` resize an image before they cut a crop."""

_GREY = 127
_TRIED = 50  # of a transform with a probability of a tenth, 1 in 40,000 pipelines would not be noticed


class PairAugmentation(SeededPipeline):
    """A pipeline for image and mask, seeded anew for every pair. Where an image is smaller than the crop, it is padded
    with grey, and the mask with pixels that do not count.

    - ``none``: the crop in the middle.
    - ``light``: a random crop, and flip.
    - ``crop_flip``: the image resized by 0.75 to 1.5, a random crop, and flip.
    - ``strong``: as ``crop_flip``, and brightness, contrast and saturation by factors in [0.6, 1.4].

    Args:
        recipe: Name of the recipe.
        img_size: Side of the crop in pixels.
        pipeline: A pipeline of the user, as :func:`gn_transfer.data.augmentation.read_pipeline` gives it, instead.

    Raises:
        ConfigError: ``bit``, which is a recipe of classification, or a pipeline whose results do not have the size.
    """

    def __init__(self, recipe: Recipe, img_size: int, pipeline: A.Compose | None = None) -> None:
        self.recipe = recipe
        self.img_size = img_size
        super().__init__(pair_pipeline(recipe, img_size) if pipeline is None else pipeline)
        self._is_own = pipeline is not None
        if self._is_own:
            for height, width in ((img_size, img_size + img_size // 2), (img_size - img_size // 4, img_size // 2)):
                for seed in range(_TRIED):  # a mask may hold what fills it later, so each transform must act here
                    self(np.full((height, width, 3), 128, np.uint8), np.ones((height, width), np.uint8), seed)

    def __call__(self, image_HWC: Pixels, mask_HW: Pixels, seed: int) -> tuple[Pixels, Pixels]:
        """Augment one pair.

        Args:
            image_HWC: Pixels, shape ``(H, W, 3)``; not changed.
            mask_HW: Targets, shape ``(H, W)``; not changed.
            seed: Decides all random parameters.

        Returns:
            Both with sides of ``img_size``.

        Raises:
            ConfigError: A pipeline of the user that fails, gives other sizes, or puts values into the mask that it
                does not hold.
        """
        if not self._is_own:
            results = self.run(seed, image=image_HWC, mask=mask_HW)
            return results["image"], results["mask"]
        height, width = mask_HW.shape
        try:
            results = self.run(seed, image=image_HWC, mask=mask_HW)
        except Exception as error:  # transforms raise what they like
            raise ConfigError(
                f"data.augmentation fails on an image of {width} x {height} pixels ({error}). Where images may be "
                f"smaller than the crop, pad them first: PadIfNeeded with fill_mask={IGNORED}."
            ) from error
        image, mask, side = results["image"], results["mask"], self.img_size
        if image.shape != (side, side, 3) or mask.shape != (side, side) or image.dtype != np.uint8:
            raise ConfigError(
                f"data.augmentation gives an image of shape {image.shape} and a mask of shape {mask.shape}; let it "
                f"end with uint8 images of {side} x {side} pixels (data.img_size), for example by a RandomCrop. The "
                "model normalizes them, so leave Normalize and ToTensorV2 out."
            )
        if strange := sorted(set(np.unique(mask).tolist()) - {*np.unique(mask_HW).tolist(), IGNORED}):
            raise ConfigError(
                f"data.augmentation puts the value {strange[0]} into a mask that does not hold it: pixels beside the "
                f"image must not count, so give its transforms fill_mask={IGNORED} and no smoothing of masks."
            )
        return image, mask


def pair_pipeline(recipe: Recipe, img_size: int) -> A.Compose:
    """Build the pipeline of a recipe.

    Args:
        recipe: The recipe.
        img_size: Side of the result in pixels.

    Raises:
        ConfigError: A recipe that has no pairs.

    Example:
        >>> [type(transform).__name__ for transform in pair_pipeline("light", 256)]
        ['RandomCrop', 'HorizontalFlip']
    """
    if recipe == "bit":
        raise ConfigError("data.recipe=bit is a recipe of classification; choose crop_flip, light, strong or none.")
    size = (img_size, img_size)
    pad = {"pad_if_needed": True, "border_mode": cv2.BORDER_CONSTANT, "fill": _GREY, "fill_mask": IGNORED}
    if recipe == "none":
        return A.Compose([A.CenterCrop(*size, **pad)])
    crop = [A.RandomCrop(*size, **pad), A.HorizontalFlip(p=0.5)]
    if recipe == "light":
        return A.Compose(crop)
    scale = A.RandomScale((SCALES[0] - 1, SCALES[1] - 1), mask_interpolation=cv2.INTER_NEAREST_EXACT, p=1.0)
    if recipe == "crop_flip":
        return A.Compose([scale, *crop])
    return A.Compose([scale, *crop, A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (0.0, 0.0), p=1.0)])


def mirrored_middle(img_size: int) -> A.Compose:
    """Build a pipeline that cuts the middle, and continues smaller images as in a mirror.

    Args:
        img_size: Side of the result in pixels.
    """
    return A.Compose([A.CenterCrop(img_size, img_size, pad_if_needed=True, border_mode=cv2.BORDER_REFLECT_101)])
