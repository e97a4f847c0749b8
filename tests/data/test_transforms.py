"""Recipes: drawn per picture from its numbers, independent draws, the stated ranges, the same with every library."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest

from gn_transfer.config import ConfigError
from gn_transfer.data.decode import decode_image
from gn_transfer.data.preprocess import preprocess_image
from gn_transfer.data.sampler import sample_uniforms
from gn_transfer.data.transforms import (
    BACKENDS,
    NUM_UNIFORMS,
    Augmentation,
    Draw,
    Recipe,
    draw,
    random_crop,
    recipe_view,
    with_opencv,
)
from gn_transfer.data.view import View

RECIPES: tuple[Recipe, ...] = get_args(Recipe)


def coordinates(side: int = 200) -> np.ndarray:
    """Pixels that tell their place: red the column, green the row (both as a fraction of 255)."""
    y, x = np.mgrid[:side, :side] * 255 / (side - 1)
    return np.round(np.stack([x, y, np.full_like(x, 99)], axis=2)).astype(np.uint8)


def numbers(index: int) -> list[float]:
    return sample_uniforms(0, 0, index, NUM_UNIFORMS)


@pytest.mark.parametrize(
    ("recipe", "img_size", "view"),
    [
        ("none", 224, View("eval", 224)),
        ("light", 224, View("square", 224)),
        ("bit", 480, View("square", 512)),
        ("bit", 128, View("square", 160)),
        ("crop_flip", 224, View("short", 438)),
        ("crop_flip", 64, View("short", 125)),
    ],
)
def test_views(recipe: Recipe, img_size: int, view: View) -> None:
    assert recipe_view(recipe, img_size) == view


@pytest.mark.parametrize("recipe", ["crop_flip", "strong"])
def test_no_crop_of_a_stored_view_has_fewer_pixels_than_the_net_sees(recipe: Recipe) -> None:
    side = recipe_view(recipe, 224).side
    for width in (side, side * 3 // 2):
        least = min(min(draw(recipe, side, width, 224, numbers(index)).crop[2:]) for index in range(3000))
        assert 223 <= least <= 280


def test_none_is_what_evaluation_sees() -> None:
    image = preprocess_image(coordinates(), 64)
    np.testing.assert_array_equal(Augmentation("none", 64)(image, numbers(0)), image)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("recipe", ["light", "crop_flip", "bit", "strong"])
def test_the_numbers_alone_decide(recipe: Recipe, backend: str) -> None:
    augment, image = Augmentation(recipe, 32, backend), coordinates(40)  # type: ignore[arg-type]
    before = image.copy()
    first = [augment(image, numbers(index)) for index in range(6)]
    again = [augment(image, numbers(index)) for index in reversed(range(6))][::-1]
    for one, other in zip(first, again, strict=True):
        assert one.shape == (32, 32, 3)
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(image, before)
    assert len({picture.tobytes() for picture in first}) >= 3


def draws(recipe: Recipe, height: int, width: int, count: int = 4000) -> np.ndarray:
    """Share of the area, aspect, flip, and centre (as fractions) of each draw, shape ``(count, 5)``."""
    rows = []
    for index in range(count):
        drawn = draw(recipe, height, width, 224, numbers(index))
        top, left, crop_height, crop_width = drawn.crop
        rows.append(
            (
                crop_height * crop_width / (height * width),
                crop_width / crop_height,
                drawn.flip,
                (top + crop_height / 2) / height,
                (left + crop_width / 2) / width,
            )
        )
    return np.array(rows, dtype=float)


def test_crop_flip_keeps_its_ranges_and_draws_independently() -> None:
    drawn = draws("crop_flip", 300, 300)
    areas, aspects, flips, *centres = drawn.T
    assert 0.34 < areas.min() < 0.36
    assert areas.max() > 0.95
    assert aspects.min() > 0.74
    assert aspects.max() < 1.35
    assert abs(flips.mean() - 0.5) < 0.03
    for centre in centres:
        assert abs(centre.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.06


@pytest.mark.parametrize(("height", "width"), [(1200, 900), (900, 1600), (3000, 2000)])
def test_a_reduced_view_gives_the_same_distribution_as_the_original(height: int, width: int) -> None:
    stored = recipe_view("crop_flip", 224).stored_shape(height, width)
    assert min(stored) == 438
    ours, theirs = draws("crop_flip", *stored), draws("crop_flip", height, width)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=0.003)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), atol=0.003)
    close = (np.abs(ours - theirs) < 0.006).all(axis=1)  # rounding decides here and there whether a crop fits
    assert close.mean() > 0.98


def test_the_crop_that_never_fits_is_the_largest_in_the_centre() -> None:
    assert random_crop(10, 1000, 0.35, [0.5] * 20) == (0, 493, 10, 13)
    assert random_crop(1000, 10, 0.35, [0.5] * 20) == (493, 0, 13, 10)


def test_light_squashes_flips_and_cuts_out() -> None:
    augment, image = Augmentation("light", 64), cv2.resize(coordinates(), (64, 64))
    plain, flipped, holes = 0, 0, 0
    for index in range(200):
        picture = augment(image, numbers(index)).astype(float)
        hole = picture[:, :, 2] == 0
        holes += bool(hole.any())
        assert hole.sum() <= 17 * 17
        corners = picture[[0, 0, 63, 63], [0, 63, 0, 63], 0]
        plain += bool(corners[0] < 10 and corners[1] > 245)
        flipped += bool(corners[0] > 245 and corners[1] < 10)
    assert plain + flipped > 180  # the whole width is kept; a hole may cover a corner
    assert 70 < flipped < 130
    assert 70 < holes < 130


def test_strong_stays_in_its_ranges() -> None:
    drawn = [draw("strong", 400, 400, 224, numbers(index)) for index in range(2000)]
    for name in ("brightness", "contrast", "saturation"):
        factors = np.array([getattr(one, name) for one in drawn])
        assert 0.6 <= factors.min() < 0.61
        assert 1.39 < factors.max() <= 1.4
    holes = [one.hole for one in drawn if one.hole is not None]
    assert 900 < len(holes) < 1100
    for top, left, height, width in holes:
        assert 22 <= min(height, width) <= max(height, width) <= 112
        assert 0 <= top <= 224 - height
        assert 0 <= left <= 224 - width


def smooth(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(3).integers(40, 216, (5, 6, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize("backend", ["albumentations", "torchvision"])
@pytest.mark.parametrize("recipe", ["light", "crop_flip", "bit", "strong"])
@pytest.mark.parametrize("size", [(300, 360), (90, 70)])
def test_the_libraries_give_the_same_pictures(recipe: Recipe, backend: str, size: tuple[int, int]) -> None:
    image = smooth(*size)
    if recipe_view(recipe, 96).kind == "square":
        image = cv2.resize(image, (recipe_view(recipe, 96).side,) * 2)  # type: ignore[assignment]
    ours, theirs = Augmentation(recipe, 96), Augmentation(recipe, 96, backend)  # type: ignore[arg-type]
    for index in range(12):
        difference = np.abs(ours(image, numbers(index)).astype(int) - theirs(image, numbers(index)).astype(int))
        assert difference.mean() < (2.0 if recipe == "strong" else 1.0)  # each colour step rounds
        assert np.quantile(difference, 0.999) <= (10 if recipe == "strong" else 5)


def test_a_large_crop_is_averaged_down() -> None:
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 255  # every other column: picking pixels would show bands
    assert np.abs(with_opencv(stripes, Draw((0, 0, 640, 640)), 160).astype(int) - 127).max() <= 1
    assert np.abs(with_opencv(stripes, Draw((0, 0, 330, 640)), 160).astype(int) - 127).max() <= 1


def test_on_real_pictures_the_filters_hardly_differ(real_data: Path) -> None:
    errors = []
    for path in sorted((real_data / "pet_originals").glob("*.jpg"))[::6]:
        image = decode_image(path)
        for index in range(4):
            pictures = [
                Augmentation("crop_flip", 224, name)(image, numbers(index)).astype(float)  # type: ignore[arg-type]
                for name in ("opencv", "albumentations", "torchvision")
            ]
            errors += [np.sqrt(np.mean((pictures[0] - other) ** 2)) for other in pictures[1:]]
    assert np.mean(errors) < 3.0


def test_an_unknown_library() -> None:
    with pytest.raises(ConfigError, match=r"data\.backend=pillow is not known; use one of opencv"):
        Augmentation("light", 32, "pillow")  # type: ignore[arg-type]


def test_milder_crops_keep_the_share_they_are_told_and_read_the_same_view() -> None:
    assert recipe_view("crop_flip", 64, 0.6) == recipe_view("crop_flip", 64) == View("short", 125)
    assert recipe_view("crop_flip", 64, 0.2).side > 125
    shares = []
    for index in range(2000):
        _, _, height, width = draw("crop_flip", 300, 300, 64, numbers(index), 0.6).crop
        shares.append(height * width / 300**2)
    assert 0.59 < min(shares) < 0.61
    assert max(shares) > 0.97


@pytest.mark.parametrize(
    ("recipe", "crop_area", "message"),
    [
        ("bit", 0.5, r"data\.recipe=bit draws no crops of random size; set data\.recipe to crop_flip or strong"),
        ("crop_flip", 0.0, r"data\.crop_area=0 must be a share"),
        ("strong", 1.5, r"data\.crop_area=1\.5 must be a share"),
    ],
)
def test_a_crop_area_that_cannot_be(recipe: Recipe, crop_area: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation(recipe, 64, crop_area=crop_area)
