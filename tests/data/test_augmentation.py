"""Recipes and users' pipelines: random parameters from the seed alone, in the stated ranges."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import albumentations as A
import cv2
import numpy as np
import pytest
import yaml

from gn_transfer.config import ConfigError
from gn_transfer.data import Folder
from gn_transfer.data.augmentation import Augmentation, Recipe, read_pipeline, recipe_pipeline, recipe_resolution
from gn_transfer.data.decode import BadImageError
from gn_transfer.data.describe import describe_data
from gn_transfer.data.preprocess import preprocess_image
from gn_transfer.data.resolution import Resolution

RECIPES: tuple[Recipe, ...] = get_args(Recipe)


def coordinates(side: int = 200) -> np.ndarray:
    """Pixels that tell their place: red the column, green the row (both as a fraction of 255)."""
    y, x = np.mgrid[:side, :side] * 255 / (side - 1)
    return np.round(np.stack([x, y, np.full_like(x, 99)], axis=2)).astype(np.uint8)


@pytest.mark.parametrize(
    ("recipe", "img_size", "resolution"),
    [
        ("none", 224, Resolution("eval", 224)),
        ("light", 224, Resolution("square", 224)),
        ("bit", 480, Resolution("square", 512)),
        ("bit", 128, Resolution("square", 160)),
        ("crop_flip", 224, Resolution("short", 438)),
        ("crop_flip", 64, Resolution("short", 125)),
    ],
)
def test_resolutions(recipe: Recipe, img_size: int, resolution: Resolution) -> None:
    assert recipe_resolution(recipe, img_size) == resolution


def test_none_is_what_evaluation_sees() -> None:
    image = preprocess_image(coordinates(), 64)
    np.testing.assert_array_equal(Augmentation("none", 64)(image, 0), image)


@pytest.mark.parametrize("recipe", ["light", "crop_flip", "bit", "strong"])
def test_the_seed_alone_decides(recipe: Recipe) -> None:
    augment, image = Augmentation(recipe, 32), coordinates(40)
    before = image.copy()
    first = [augment(image, seed) for seed in range(8)]
    again = [augment(image, seed) for seed in reversed(range(8))][::-1]
    with ThreadPoolExecutor(3) as pool:
        threaded = list(pool.map(lambda seed: pickle.loads(pickle.dumps(augment))(image, seed), range(8)))
    for one, other, third in zip(first, again, threaded, strict=True):
        assert one.shape == (32, 32, 3)
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, third)
    np.testing.assert_array_equal(image, before)
    assert len({augmented.tobytes() for augmented in first}) >= 4


def crops(recipe: Recipe, min_crop_scale: float | None = None, count: int = 1500) -> np.ndarray:
    """Fraction of the area, aspect, flip and centre of each random crop, shape ``(count, 5)``."""
    side = 300
    augment, image, rows = Augmentation(recipe, 64, min_crop_scale), coordinates(side).astype(np.uint8), []
    for seed in range(count):
        red, green = (augment(image, seed)[:, :, channel].astype(float) for channel in (0, 1))
        left, right, top, bottom = (
            value / 255 for value in (red[:, 0].mean(), red[:, -1].mean(), green[0].mean(), green[-1].mean())
        )
        width, height = abs(right - left) * 64 / 63, (bottom - top) * 64 / 63
        rows.append((width * height, width / height, left > right, (top + bottom) / 2, (left + right) / 2))
    return np.array(rows, dtype=float)


def test_crop_flip_keeps_its_ranges_and_varies_independently() -> None:
    found = crops("crop_flip")
    areas, aspects, flips, *centres = found.T
    assert 0.32 < areas.min() < 0.38
    assert areas.max() > 0.93
    assert 0.73 < aspects.min() < 0.78
    assert 1.28 < aspects.max() < 1.37
    assert abs(flips.mean() - 0.5) < 0.05
    for centre in centres:
        assert abs(centre.mean() - 0.5) < 0.02
    assert np.abs(np.corrcoef(found.T) - np.eye(5)).max() < 0.1


def test_larger_crops_keep_the_scale_that_is_set_and_read_the_same_cached_images() -> None:
    assert recipe_resolution("crop_flip", 64, 0.6) == recipe_resolution("crop_flip", 64) == Resolution("short", 125)
    assert recipe_resolution("crop_flip", 64, 0.2).side > 125
    areas = crops("crop_flip", 0.6, count=400)[:, 0]
    assert 0.57 < areas.min() < 0.64


def test_light_resizes_flips_and_cuts_out() -> None:
    augment, image = Augmentation("light", 64), cv2.resize(coordinates(), (64, 64))
    plain, flipped, holes = 0, 0, 0
    for seed in range(200):
        augmented = augment(image, seed).astype(float)
        hole = augmented[:, :, 2] == 0
        holes += bool(hole.any())
        assert hole.sum() <= 17 * 17
        corners = augmented[[0, 0, 63, 63], [0, 63, 0, 63], 0]
        plain += bool(corners[0] < 10 and corners[1] > 245)
        flipped += bool(corners[0] > 245 and corners[1] < 10)
    assert plain + flipped > 180  # the whole width is kept; a hole may cover a corner
    assert 70 < flipped < 130
    assert 70 < holes < 130


def test_strong_changes_colors_and_cuts_larger_holes() -> None:
    names = [type(transform).__name__ for transform in recipe_pipeline("strong", 64) or ()]
    assert names == ["RandomResizedCrop", "HorizontalFlip", "ColorJitter", "CoarseDropout"]
    augment, image = Augmentation("strong", 64), np.full((200, 200, 3), (120, 60, 200), np.uint8)
    means = np.array([augment(image, seed).reshape(-1, 3).max(axis=0) for seed in range(300)], dtype=float)
    assert means.std(axis=0).min() > 10
    holes = [(augment(image, seed) == 0).all(axis=2).sum() for seed in range(300)]
    assert 100 < np.count_nonzero(holes) < 200
    assert max(holes) <= 33 * 33


def test_a_large_crop_is_averaged_down() -> None:
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 255  # every other column: picking pixels would show bands
    augmented = Augmentation("crop_flip", 160, 0.999)(stripes, 0).astype(int)
    assert np.abs(augmented[:, 2:-2] - 127).max() <= 8


@pytest.mark.parametrize(
    ("recipe", "min_crop_scale", "message"),
    [
        ("bit", 0.5, r"data\.recipe=bit has no crops of random size that it could change; set data\.recipe to"),
        ("crop_flip", 0.0, r"data\.min_crop_scale=0 must be a fraction"),
        ("strong", 1.5, r"data\.min_crop_scale=1\.5 must be a fraction"),
    ],
)
def test_a_crop_scale_that_cannot_be(recipe: Recipe, min_crop_scale: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation(recipe, 64, min_crop_scale)


# -- pipelines of the user --------------------------------------------------------------------------------------


def save(path: Path, transforms: list[Any]) -> Path:
    A.save(A.Compose(transforms), path, data_format="yaml")
    return path


def test_a_pipeline_of_the_user_trains_and_repeats(tmp_path: Path, folder_root: Path) -> None:
    transforms = [A.RandomResizedCrop((32, 32)), A.OneOf([A.Blur(), A.HueSaturationValue()], p=1.0), A.Rotate(20)]
    path = save(tmp_path / "mine.yaml", transforms)
    batches = []
    for workers in (0, 2):
        data = Folder(folder_root, img_size=32, augmentation=path, num_workers=workers, batch_size=4)
        data.setup("fit")
        batches.append([images for images, _ in data.train_dataloader()])
        assert f"augmentation {path}" in dict(describe_data(data))["images"]
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["transform"].update(__class_fullname__="subprocess.Popen"),
            "names subprocess.Popen, which is not",
        ),
        (lambda c: c["transform"]["transforms"][0].update(__class_fullname__="Lambda"), "names Lambda, which is not"),
        (
            lambda c: c["transform"]["transforms"][0].update(__class_fullname__="HorizontalFlop"),
            "did you mean 'HorizontalFlip'",
        ),
        (lambda c: c["transform"]["transforms"][0].update(chance=1), "is not a serialized pipeline"),
        (lambda c: c.pop("transform"), "is not a serialized pipeline"),
    ],
    ids=["class", "lambda", "typo", "argument", "empty"],
)
def test_a_file_that_is_no_pipeline_of_albumentations(tmp_path: Path, change: Any, message: str) -> None:
    path = save(tmp_path / "bad.yaml", [A.HorizontalFlip()])
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        read_pipeline(path)


@pytest.mark.parametrize("text", [None, "{", "\x00"])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"data\.augmentation=.* cannot be read"):
        read_pipeline(path)


def test_a_pipeline_whose_images_have_another_size(tmp_path: Path) -> None:
    pipeline = read_pipeline(save(tmp_path / "small.yaml", [A.RandomCrop(16, 16)]))
    with pytest.raises(ConfigError, match=r"shape \(16, 16, 3\) .* uint8 images of 32 x 32 pixels"):
        Augmentation("none", 32, pipeline=pipeline)
    pipeline = read_pipeline(save(tmp_path / "large.yaml", [A.RandomCrop(999, 999)]))
    with pytest.raises(ConfigError, match=r"data\.augmentation fails on an image of"):
        Augmentation("none", 32, pipeline=pipeline)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([A.RandomResizedCrop((32, 32)), A.ToFloat(max_value=255.0, p=0.3)], "type float32"),
        (
            [A.OneOf([A.RandomResizedCrop((32, 32), p=0.9), A.RandomResizedCrop((24, 24), p=0.1)], p=1.0)],
            r"shape \(24, 24, 3\)",
        ),
    ],
    ids=["type", "size"],
)
def test_a_pipeline_that_only_sometimes_gives_something_else(
    tmp_path: Path, folder_root: Path, transforms: list[Any], message: str
) -> None:
    """The first image of it fits, so that nothing is found before the training."""
    path = save(tmp_path / "mine.yaml", transforms)
    data = Folder(folder_root, img_size=32, augmentation=path)
    data.setup("fit")
    dataset = data.train_dataset
    keys = [(epoch, index) for epoch in range(4) for index in range(len(dataset.images))]
    with pytest.raises(BadImageError, match=rf"{folder_root.name}/.*: data\.augmentation gives pixels of .*{message}"):
        dataset.batch(keys)


@pytest.mark.parametrize(
    ("transform", "name"),
    [(A.PadIfNeeded(8000, 8000), "min_height 8000"), (A.RandomScale((0, 5000)), "scale_limit 500")],
    ids=["padding", "scale"],
)
def test_sizes_that_would_fill_the_memory(tmp_path: Path, transform: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"asks for {name}.*; at most 4096 pixels"):
        read_pipeline(save(tmp_path / "large.yaml", [transform]))


def test_transforms_that_read_other_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "bad.yaml", [A.HorizontalFlip()])
    for name in ("FDA", "HistogramMatching", "PixelDistributionAdaptation", "TextImage"):
        assert hasattr(A, name)
        content = yaml.safe_load(path.read_text())
        content["transform"]["transforms"][0] = {"__class_fullname__": name, "reference_images": ["/x.png"], "p": 1.0}
        (tmp_path / "reads.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=f"names {name}, which is not an allowed transform"):
            read_pipeline(tmp_path / "reads.yaml")
