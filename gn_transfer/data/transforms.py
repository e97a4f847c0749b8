"""Augmentation recipes for training: what is drawn per picture, and three libraries that carry it out.

The draws are ours, from (seed, epoch, index) alone, so that a recipe means the same with every library, any number of
workers, and with or without a cache. Evaluation is in ``preprocess``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.config import ConfigError
from gn_transfer.data.view import View

Recipe = Literal["none", "light", "crop_flip", "bit", "strong"]
Backend = Literal["opencv", "albumentations", "torchvision"]
Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Top, left, height, width, in pixels."""

RATIO = (3 / 4, 4 / 3)
"""Least and greatest width / height of a random crop."""

NUM_UNIFORMS = 30
"""Random numbers that a picture's draw may use."""

_LEAST_AREA: dict[Recipe, float] = {"crop_flip": 0.35, "strong": 0.25}
_CROP_ATTEMPTS = 5
_JITTER = 0.4


@dataclass(frozen=True)
class Draw:
    """What happens to one picture, in this order.

    Attributes:
        crop: Box of the view that is resized to the square.
        flip: Mirror left and right.
        brightness: Factor on the pixels.
        contrast: Factor on their distance from the mean grey.
        saturation: Factor on their distance from their own grey.
        hole: Box of the square that is painted black, or None.
    """

    crop: Box
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hole: Box | None = None


class Augmentation:
    """A recipe at one size.

    - ``none``: what evaluation sees.
    - ``light``: the blog's: the whole picture squashed to the square, flip, and in half of the pictures one hole of 10
      to 25 % of the side.
    - ``crop_flip``: a random crop of 35-100 % of the area (or from ``crop_area`` up), aspect 3/4-4/3, and flip.
    - ``bit``: BiT's: the picture squashed to 16/15 of the side (512 for 480; 5/4 up to 128 px, 160 for 128), a random
      square crop, and flip (arXiv:1912.11370, section 3.3).
    - ``strong``: a random crop of 25-100 % of the area (likewise), flip, brightness, contrast and saturation by factors
      in [0.6, 1.4], and in half of the pictures one hole of 10 to 50 % of the side.

    Args:
        recipe: Name of the recipe.
        img_size: Side of the result in pixels.
        backend: Who carries it out; see :data:`BACKENDS`.
        crop_area: Least share of the area that a random crop keeps, in (0, 1], instead of the recipe's own.

    Attributes:
        view: What the recipe needs of each picture: its input.

    Raises:
        ConfigError: An unknown backend, a share out of range, or one for a recipe without random crops.
    """

    def __init__(
        self, recipe: Recipe, img_size: int, backend: Backend = "opencv", crop_area: float | None = None
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"data.backend={backend} is not known; use one of {', '.join(BACKENDS)}.")
        if crop_area is not None and recipe not in _LEAST_AREA:
            raise ConfigError(
                f"data.crop_area={crop_area:g}: data.recipe={recipe} draws no crops of random size; set data.recipe to "
                f"{' or '.join(_LEAST_AREA)}, or leave crop_area out."
            )
        if crop_area is not None and not 0 < crop_area <= 1:
            raise ConfigError(f"data.crop_area={crop_area:g} must be a share of the area, above 0 and at most 1.")
        self.recipe = recipe
        self.img_size = img_size
        self.backend = backend
        self.crop_area = crop_area
        self.view = recipe_view(recipe, img_size, crop_area)
        self._apply = BACKENDS[backend]

    def __call__(self, view_HWC: Pixels, uniforms: Sequence[float]) -> Pixels:
        """Augment one picture.

        Args:
            view_HWC: The picture's view, shape ``(H, W, 3)``; left untouched.
            uniforms: :data:`NUM_UNIFORMS` numbers in [0, 1) that decide everything.

        Returns:
            Pixels, shape ``(img_size, img_size, 3)``.
        """
        if self.recipe == "none":
            return view_HWC
        height, width = view_HWC.shape[:2]
        drawn = draw(self.recipe, height, width, self.img_size, uniforms, self.crop_area)
        return self._apply(view_HWC, drawn, self.img_size)


def recipe_view(recipe: Recipe, img_size: int, crop_area: float | None = None) -> View:
    """Choose the view that a recipe needs.

    For a random crop, large pictures are reduced to a short side of ``img_size / sqrt(least area * least aspect)``, 438
    pixels for ``crop_flip`` at 224: the narrowest crop that can be drawn still covers ``img_size`` of them, so nothing
    is magnified that the file had in more detail. Milder crops than the recipe's own read the same view, and so the
    same cache.

    Args:
        recipe: The recipe.
        img_size: Side of the result in pixels.
        crop_area: Least share of the area that a random crop keeps, instead of the recipe's own.

    Example:
        >>> recipe_view("crop_flip", 224), recipe_view("bit", 480)
        (View(kind='short', side=438), View(kind='square', side=512))
    """
    if recipe == "none":
        return View("eval", img_size)
    if recipe == "light":
        return View("square", img_size)
    if recipe == "bit":
        return View("square", round(img_size * (5 / 4 if img_size <= 128 else 16 / 15)))
    least = min(_LEAST_AREA[recipe], 1.0 if crop_area is None else crop_area)
    return View("short", math.ceil(img_size / math.sqrt(least * RATIO[0])))


def draw(
    recipe: Recipe, height: int, width: int, img_size: int, uniforms: Sequence[float], crop_area: float | None = None
) -> Draw:
    """Turn random numbers into what happens to one picture; a pure function.

    Args:
        recipe: The recipe, not ``none``.
        height: Of the view, in pixels.
        width: Likewise.
        img_size: Side of the result in pixels.
        uniforms: :data:`NUM_UNIFORMS` numbers in [0, 1); each serves one purpose, whatever the picture.
        crop_area: Least share of the area that a random crop keeps, instead of the recipe's own.

    Returns:
        The draw.
    """
    u_flip, u_hole, u_hole_height, u_hole_width, u_hole_top, u_hole_left, *rest = uniforms
    flip = u_flip < 0.5
    hole = None
    if recipe in ("light", "strong") and u_hole < 0.5:
        most = 0.25 if recipe == "light" else 0.5
        hole_height = max(1, round(img_size * (0.1 + (most - 0.1) * u_hole_height)))
        hole_width = max(1, round(img_size * (0.1 + (most - 0.1) * u_hole_width)))
        hole = (
            int(u_hole_top * (img_size - hole_height + 1)),
            int(u_hole_left * (img_size - hole_width + 1)),
            hole_height,
            hole_width,
        )
    if recipe == "light":
        return Draw((0, 0, height, width), flip, hole=hole)
    if recipe == "bit":
        side = min(img_size, height, width)
        return Draw((int(rest[0] * (height - side + 1)), int(rest[1] * (width - side + 1)), side, side), flip)
    crop = random_crop(height, width, _LEAST_AREA[recipe] if crop_area is None else crop_area, rest)
    if recipe == "crop_flip":
        return Draw(crop, flip)
    brightness, contrast, saturation = (1 - _JITTER + 2 * _JITTER * u for u in rest[-3:])
    return Draw(crop, flip, brightness, contrast, saturation, hole)


def random_crop(height: int, width: int, least_area: float, uniforms: Sequence[float]) -> Box:
    """Draw a crop as Inception's "random resized crop" does (Szegedy et al. 2014, arXiv:1409.4842).

    The share of the area is uniform in [least_area, 1], the logarithm of width / height in that of :data:`RATIO`, the
    place uniform; a crop that does not fit is drawn anew, five times, then the largest allowed one in the centre.

    Args:
        height: Of the picture, in pixels.
        width: Likewise.
        least_area: Least share of the picture's area, in (0, 1].
        uniforms: Four numbers in [0, 1) per attempt, 20 in all.

    Returns:
        The box.

    Example:
        >>> random_crop(100, 100, 0.25, [0.0, 0.5, 0.0, 0.999] * 5)
        (0, 50, 50, 50)
    """
    log_low, log_high = math.log(RATIO[0]), math.log(RATIO[1])
    for attempt in range(_CROP_ATTEMPTS):
        u_area, u_ratio, u_top, u_left = uniforms[4 * attempt : 4 * attempt + 4]
        area = height * width * (least_area + (1 - least_area) * u_area)
        ratio = math.exp(log_low + (log_high - log_low) * u_ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return (
                int(u_top * (height - crop_height + 1)),
                int(u_left * (width - crop_width + 1)),
                crop_height,
                crop_width,
            )
    crop_width = max(1, min(width, round(height * RATIO[1])))
    crop_height = max(1, min(height, round(width / RATIO[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def with_opencv(view_HWC: Pixels, drawn: Draw, img_size: int) -> Pixels:
    """Carry a draw out with OpenCV, the fastest.

    A crop more than twice as large as the square is halved by means of 2 x 2 first; the bilinear step after that reads
    every pixel. Up to a factor of two that is sharper than averaging areas (on Pets a difference of 2 in 255, rms,
    between the two; 1.5 between averaging and bicubic), and takes a sixth of its time.

    Args:
        view_HWC: The view.
        drawn: What to do.
        img_size: Side of the result in pixels.

    Returns:
        Pixels, shape ``(img_size, img_size, 3)``, an array of its own.
    """
    top, left, height, width = drawn.crop
    pixels: Pixels = view_HWC[top : top + height, left : left + width]
    while min(height, width) > 2 * img_size:
        height, width = height // 2, width // 2
        pixels = cv2.resize(pixels[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    pixels = cv2.resize(pixels, (img_size, img_size), interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
    if drawn.flip:
        pixels = cv2.flip(pixels, 1)  # type: ignore[assignment]
    if drawn.brightness != 1.0:
        pixels = cv2.convertScaleAbs(pixels, alpha=drawn.brightness)  # type: ignore[assignment]
    if drawn.contrast != 1.0:
        mean = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).mean()
        pixels = _blend(pixels, np.full_like(pixels, round(mean)), drawn.contrast)
    if drawn.saturation != 1.0:
        grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        pixels = _blend(pixels, grey, drawn.saturation)  # type: ignore[arg-type]
    if drawn.hole is not None:
        top, left, height, width = drawn.hole
        pixels = pixels.copy() if np.shares_memory(pixels, view_HWC) else pixels
        pixels[top : top + height, left : left + width] = 0
    return pixels


def with_albumentations(view_HWC: Pixels, drawn: Draw, img_size: int) -> Pixels:
    """Carry a draw out with albumentations, which averages areas where a crop shrinks; see :func:`with_opencv`."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks a package index for news otherwise
    from albucore import hflip
    from albumentations.augmentations.crops import functional as crops
    from albumentations.augmentations.dropout import functional as dropout
    from albumentations.augmentations.geometric import functional as geometric
    from albumentations.augmentations.pixel import functional as pixel

    top, left, height, width = drawn.crop
    pixels = crops.crop(view_HWC, left, top, left + width, top + height)
    shrinks = height > img_size or width > img_size
    pixels = geometric.resize(pixels, (img_size, img_size), cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if drawn.flip:
        pixels = hflip(pixels)
    if drawn.brightness != 1.0:
        pixels = pixel.adjust_brightness_torchvision(pixels, drawn.brightness)
    if drawn.contrast != 1.0:
        pixels = pixel.adjust_contrast_torchvision(pixels, drawn.contrast)
    if drawn.saturation != 1.0:
        pixels = pixel.adjust_saturation_torchvision(pixels, drawn.saturation, 0)
    if drawn.hole is not None:
        top, left, height, width = drawn.hole
        holes = np.array([[left, top, left + width, top + height]])
        pixels = dropout.cutout(np.array(pixels), holes, 0, np.random.default_rng(0))
    return np.asarray(pixels, dtype=np.uint8)


def with_torchvision(view_HWC: Pixels, drawn: Draw, img_size: int) -> Pixels:
    """Carry a draw out with torchvision v2, bilinear with antialiasing; see :func:`with_opencv`."""
    import torch
    from torchvision.transforms.v2 import functional as tv

    image = torch.from_numpy(view_HWC.transpose(2, 0, 1).copy())
    image = tv.resized_crop(image, *drawn.crop, [img_size, img_size], antialias=True)
    if drawn.flip:
        image = tv.horizontal_flip(image)
    if drawn.brightness != 1.0:
        image = tv.adjust_brightness(image, drawn.brightness)
    if drawn.contrast != 1.0:
        image = tv.adjust_contrast(image, drawn.contrast)
    if drawn.saturation != 1.0:
        image = tv.adjust_saturation(image, drawn.saturation)
    if drawn.hole is not None:
        image = tv.erase(image, *drawn.hole, v=torch.zeros(3, 1, 1, dtype=torch.uint8))
    return np.asarray(image.permute(1, 2, 0).contiguous(), dtype=np.uint8)


BACKENDS: dict[Backend, Callable[[Pixels, Draw, int], Pixels]] = {
    "opencv": with_opencv,
    "albumentations": with_albumentations,
    "torchvision": with_torchvision,
}
"""All carry out the same draws; they differ in the filter of the resize, and in rounding."""

assert tuple(BACKENDS) == get_args(Backend)


def _blend(pixels: Pixels, other: Pixels, factor: float) -> Pixels:
    return np.asarray(cv2.addWeighted(pixels, factor, other, 1.0 - factor, 0.0), dtype=np.uint8)
