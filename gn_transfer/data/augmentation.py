"""Augmentation of training images: recipes and users' own pipelines, as albumentations ``Compose`` objects.

The random parameters of an image come from (seed, epoch, index) alone, so that a pipeline gives the same images with
any number of workers, with or without a cache, and in a resumed run. Evaluation is in ``preprocess``.
"""

from __future__ import annotations

import math
import os
import random
import re
import threading
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.config import ConfigError, did_you_mean
from gn_transfer.data.resolution import Resolution
from gn_transfer.yaml_files import read_yaml

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks a package index for news otherwise
import albumentations as A

Recipe = Literal["none", "light", "crop_flip", "bit", "strong"]
Pixels = npt.NDArray[np.uint8]

RATIO = (3 / 4, 4 / 3)
"""Smallest and largest width / height of a random crop."""

_MIN_CROP_SCALE: dict[Recipe, float] = {"crop_flip": 0.35, "strong": 0.25}
_FORBIDDEN = {
    *("Lambda", "ReplayCompose"),  # they carry code, or state of other images
    *("FDA", "HistogramMatching", "PixelDistributionAdaptation", "TemplateTransform", "TextImage"),  # read other files
}
_MOST_PIXELS = 4096
"""Largest side, padding or crop in pixels that the file of a pipeline may ask for."""
_IN_PIXELS = re.compile("height|width|size|padding|px|divisor|scale_limit")


class SeededPipeline:
    """A pipeline of albumentations whose random parameters are a function of a seed, in any thread.

    Args:
        pipeline: The ``Compose``; None changes nothing.
    """

    def __init__(self, pipeline: Any | None) -> None:
        self._pipeline = pipeline
        self._of_thread = threading.local()

    def run(self, seed: int, **targets: Pixels) -> dict[str, Pixels]:
        """Run the pipeline.

        Args:
            seed: Decides all random parameters.
            **targets: Image and mask, as albumentations names them; not changed.

        Returns:
            The results under the same names.
        """
        if self._pipeline is None:
            return targets
        pipeline = getattr(self._of_thread, "pipeline", None)
        if pipeline is None:  # a pipeline holds its random generator, so each data thread needs its own
            pipeline = self._of_thread.pipeline = deepcopy(self._pipeline)
        # One generator for the whole pipeline. set_random_seed would give every transform a generator of the same seed,
        # so that the first random numbers of a crop also decide whether the image is flipped.
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        results: dict[str, Pixels] = pipeline(**targets)
        return results

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_of_thread"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._of_thread = threading.local()


class Augmentation(SeededPipeline):
    """A pipeline at one size, seeded anew for every image.

    - ``none``: what evaluation sees.
    - ``light``: the blog's. The whole image resized to the square, flip, and in half of the images one hole of 10 to
      25 % of the side.
    - ``crop_flip``: a random crop of 35-100 % of the area (or from ``min_crop_scale`` up), aspect 3/4-4/3, and flip.
    - ``bit``: BiT's. The image resized to 16/15 of the side (512 for 480; 5/4 up to 128 px, 160 for 128), a random
      square crop, and flip (arXiv:1912.11370, section 3.3).
    - ``strong``: a random crop of 25-100 % of the area (likewise), flip, brightness, contrast and saturation by
      factors in [0.6, 1.4], and in half of the images one hole of 10 to 50 % of the side.

    Args:
        recipe: Name of the recipe.
        img_size: Side of the result in pixels.
        min_crop_scale: Smallest fraction of the area that a random crop keeps, in (0, 1], instead of the recipe's.
        pipeline: A pipeline of the user, as :func:`read_pipeline` gives it, instead of the recipe.

    Attributes:
        resolution: What the pipeline needs of each image: its input.

    Raises:
        ConfigError: A fraction out of range, one for a recipe without random crops, or a pipeline whose images do not
            have the size.
    """

    def __init__(
        self, recipe: Recipe, img_size: int, min_crop_scale: float | None = None, pipeline: Any | None = None
    ) -> None:
        if min_crop_scale is not None and (recipe not in _MIN_CROP_SCALE or pipeline is not None):
            raise ConfigError(
                f"data.min_crop_scale={min_crop_scale:g}: "
                f"{'data.augmentation' if pipeline is not None else f'data.recipe={recipe}'} has no crops of random "
                f"size that it could change; set data.recipe to {' or '.join(_MIN_CROP_SCALE)}, or leave it out."
            )
        if min_crop_scale is not None and not 0 < min_crop_scale <= 1:
            raise ConfigError(
                f"data.min_crop_scale={min_crop_scale:g} must be a fraction of the area, above 0 and at most 1."
            )
        self.recipe = recipe
        self.img_size = img_size
        self.min_crop_scale = min_crop_scale
        self.resolution = recipe_resolution("strong" if pipeline is not None else recipe, img_size, min_crop_scale)
        super().__init__(recipe_pipeline(recipe, img_size, min_crop_scale) if pipeline is None else pipeline)
        self._is_own = pipeline is not None
        if self._is_own:
            side = self.resolution.side
            self(np.full((side, side + side // 2, 3), 128, np.uint8), seed=0)

    def __call__(self, image_HWC: Pixels, seed: int) -> Pixels:
        """Augment one image.

        Args:
            image_HWC: The image at :attr:`resolution`, shape ``(H, W, 3)``; not changed.
            seed: Decides all random parameters.

        Returns:
            Pixels, shape ``(img_size, img_size, 3)``.

        Raises:
            ConfigError: A pipeline of the user that fails, or gives something else.
        """
        if not self._is_own:
            return self.run(seed, image=image_HWC)["image"]
        height, width = image_HWC.shape[:2]
        try:
            result = self.run(seed, image=image_HWC)["image"]
        except Exception as error:  # transforms raise what they like
            raise ConfigError(f"data.augmentation fails on an image of {width} x {height} pixels ({error}).") from error
        if result.shape != (self.img_size, self.img_size, 3) or result.dtype != np.uint8:
            raise ConfigError(
                f"data.augmentation gives pixels of shape {result.shape} and type {result.dtype}; let it end with "
                f"uint8 images of {self.img_size} x {self.img_size} pixels (data.img_size), for example by a "
                "RandomResizedCrop. The model normalizes them, so leave Normalize and ToTensorV2 out."
            )
        return result


def recipe_pipeline(recipe: Recipe, img_size: int, min_crop_scale: float | None = None) -> A.Compose | None:
    """Build the pipeline of a recipe.

    Args:
        recipe: The recipe.
        img_size: Side of the result in pixels.
        min_crop_scale: Smallest fraction of the area that a random crop keeps, instead of the recipe's.

    Returns:
        The pipeline; None for the recipe ``none``.

    Example:
        >>> [type(transform).__name__ for transform in recipe_pipeline("crop_flip", 224)]
        ['RandomResizedCrop', 'HorizontalFlip']
    """
    size = (img_size, img_size)
    flip = A.HorizontalFlip(p=0.5)
    if recipe == "none":
        return None
    if recipe == "light":
        return A.Compose([_resize(img_size), flip, _hole(0.25)])
    if recipe == "bit":
        return A.Compose([A.RandomCrop(*size), flip])
    scale = (_MIN_CROP_SCALE[recipe] if min_crop_scale is None else min_crop_scale, 1.0)
    crop = A.RandomResizedCrop(size, scale=scale, ratio=RATIO, area_for_downscale="image")
    if recipe == "crop_flip":
        return A.Compose([crop, flip])
    colors = A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (0.0, 0.0), p=1.0)
    return A.Compose([crop, flip, colors, _hole(0.5)])


def recipe_resolution(recipe: Recipe, img_size: int, min_crop_scale: float | None = None) -> Resolution:
    """Choose the resolution at which a recipe needs its images.

    For a random crop, large images are reduced to a short side of ``img_size / sqrt(scale * aspect)`` with the
    smallest scale and aspect, 438 pixels for ``crop_flip`` at 224. So the narrowest crop still covers ``img_size`` of
    them, and nothing is magnified that the file had in more detail. Larger crops than the recipe's own read the same
    cached images.

    Args:
        recipe: The recipe.
        img_size: Side of the result in pixels.
        min_crop_scale: Smallest fraction of the area that a random crop keeps, instead of the recipe's.

    Example:
        >>> recipe_resolution("crop_flip", 224), recipe_resolution("bit", 480)
        (Resolution(kind='short', side=438), Resolution(kind='square', side=512))
    """
    if recipe == "none":
        return Resolution("eval", img_size)
    if recipe == "light":
        return Resolution("square", img_size)
    if recipe == "bit":
        return Resolution("square", round(img_size * (5 / 4 if img_size <= 128 else 16 / 15)))
    scale = min(_MIN_CROP_SCALE[recipe], 1.0 if min_crop_scale is None else min_crop_scale)
    return Resolution("short", math.ceil(img_size / math.sqrt(scale * RATIO[0])))


def read_pipeline(path: Path) -> Any:
    """Read a pipeline that albumentations has serialized (``A.save(pipeline, "x.yaml", data_format="yaml")``).

    Args:
        path: YAML or JSON file.

    Returns:
        The ``Compose``.

    Raises:
        ConfigError: Unreadable, or it names something else than a transform of albumentations. No code is run.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.augmentation={path} cannot be read ({error}).") from error
    allowed = transform_names()
    names = list(_class_names(content))
    for name in names:
        if name not in allowed:
            near = did_you_mean(name, sorted(allowed)).split(" Allowed")[0]
            raise ConfigError(
                f"data.augmentation={path} names {name}, which is not an allowed transform of albumentations "
                f"{A.__version__}; {near if near.startswith('did') else 'use its own transforms'}."
            )
    if large := next(_large_sizes(content), None):
        raise ConfigError(f"data.augmentation={path} asks for {large}; at most {_MOST_PIXELS} pixels are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # albumentations only warns of arguments that it does not know
            warnings.filterwarnings("ignore", "Argument.* 'padding' .* PadIfNeeded")  # which it writes itself
            pipeline = A.from_dict(content)
    except Exception as error:  # pydantic, KeyError, TypeError, ...
        raise ConfigError(
            f"data.augmentation={path} is not a serialized pipeline ({' '.join(str(error).split())[:300]}); write one "
            'with albumentations.save(pipeline, "file.yaml", data_format="yaml").'
        ) from error
    if not isinstance(pipeline, A.Compose):
        raise ConfigError(f"data.augmentation={path} holds a single {names[0]}; wrap it in a Compose.")
    return pipeline


def transform_names() -> set[str]:
    """Names of the transforms and compositions that a pipeline may use, as albumentations serializes them."""
    kinds = (A.BasicTransform, A.BaseCompose)
    exported = (getattr(A, name) for name in dir(A) if name not in _FORBIDDEN)
    found: list[Any] = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, kinds)]
    return {kind.get_class_fullname() for kind in found}


def _class_names(content: Any) -> Iterator[str]:
    """Yield every class that a serialized pipeline names, at any depth."""
    if isinstance(content, dict):
        if "__class_fullname__" in content:
            yield str(content["__class_fullname__"])
        for value in content.values():
            yield from _class_names(value)
    elif isinstance(content, list):
        for value in content:
            yield from _class_names(value)


def _large_sizes(content: Any, key: str = "") -> Iterator[str]:
    """Describe sizes in pixels that would fill the memory, at any depth."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _large_sizes(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _large_sizes(value, key)
    elif isinstance(content, int | float) and abs(content) > _MOST_PIXELS and _IN_PIXELS.search(key):
        yield f"{key} {content:g}"


def _resize(img_size: int) -> A.Resize:
    return A.Resize(img_size, img_size, interpolation=cv2.INTER_LINEAR, area_for_downscale="image")


def _hole(largest: float) -> A.CoarseDropout:
    """One black hole in half of the images, of 10 % to ``largest`` of the side."""
    return A.CoarseDropout((1, 1), (0.1, largest), (0.1, largest), fill=0, p=0.5)
