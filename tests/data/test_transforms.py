"""Recipes: drawn per picture from its seed, independent draws, the stated ranges."""

from __future__ import annotations

import numpy as np
import pytest

from gn_transfer.data.preprocess import preprocess_image
from gn_transfer.data.transforms import Augmentation


def coordinates(side: int = 200) -> np.ndarray:
    """Pixels that tell their place: red the column, green the row (both as a fraction of 255)."""
    y, x = np.mgrid[:side, :side] * 255 / (side - 1)
    return np.round(np.stack([x, y, np.full_like(x, 99)], axis=2)).astype(np.uint8)


def test_none_is_what_evaluation_sees() -> None:
    image = coordinates()
    np.testing.assert_array_equal(Augmentation("none", 64)(image, 5), preprocess_image(image, 64))


@pytest.mark.parametrize("recipe", ["light", "crop_flip"])
def test_the_seed_alone_decides(recipe: str) -> None:
    augment, image = Augmentation(recipe, 32), coordinates()  # type: ignore[arg-type]
    first = [augment(image, seed) for seed in range(6)]
    again = [augment(image, seed) for seed in reversed(range(6))][::-1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({picture.tobytes() for picture in first}) == 6 if recipe == "crop_flip" else 3


def crop_flip_draws(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area fraction, aspect ratio and flip of each crop, read from the coordinates in its corners."""
    augment, image = Augmentation("crop_flip", 64), coordinates()
    areas, aspects, flips = [], [], []
    for seed in range(count):
        crop = augment(image, seed).astype(float)
        width, height = (np.ptp(crop[32, :, 0]) / 255, np.ptp(crop[:, 32, 1]) / 255)
        areas.append(width * height)
        aspects.append(width / height)
        flips.append(crop[32, 0, 0] > crop[32, -1, 0])
    return np.array(areas), np.array(aspects), np.array(flips)


def test_crop_flip_keeps_its_ranges_and_draws_independently() -> None:
    areas, aspects, flips = crop_flip_draws(600)
    assert areas.min() > 0.32  # the corners' pixel centres lie inside the crop
    assert areas.max() > 0.9
    assert aspects.min() > 0.72
    assert aspects.max() < 1.4
    assert abs(flips.mean() - 0.5) < 0.07  # 3.4 standard errors
    # One seed given to each transform would flip exactly the small crops: correlation near -0.8.
    assert abs(np.corrcoef(areas, flips)[0, 1]) < 0.14
    assert abs(np.corrcoef(areas, aspects)[0, 1]) < 0.14


def test_light_squashes_flips_and_cuts_out() -> None:
    augment, image = Augmentation("light", 64), coordinates()
    plain, flipped, holes = 0, 0, 0
    for seed in range(200):
        picture = augment(image, seed).astype(float)
        hole = picture[:, :, 2] == 0
        holes += bool(hole.any())
        assert hole.sum() <= 17 * 17
        corners = picture[[0, 0, 63, 63], [0, 63, 0, 63], 0]
        plain += bool(corners[0] < 10 and corners[1] > 245)
        flipped += bool(corners[0] > 245 and corners[1] < 10)
    assert plain + flipped > 180  # the whole width is kept; a hole may cover a corner
    assert 70 < flipped < 130
    assert 70 < holes < 130
