"""Copies, lookalikes and watermarks; and splits that keep them on one side."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from gn_transfer.config import ConfigError
from gn_transfer.data import Folder
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.duplicates import group_duplicates


def scene(seed: int, side: int = 160) -> Image.Image:
    """A smooth random image."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC))


def watermarked(image: Image.Image) -> Image.Image:
    marked = image.copy()
    ImageDraw.Draw(marked).rectangle((100, 130, 158, 158), fill="white")
    return Image.blend(image, marked, 0.6)


def groups_of(root: Path) -> list[list[str]]:
    names = sorted(path.name for path in root.iterdir())
    found = group_duplicates(root, [LabeledImage(name, 0) for name in names])
    return [[names[position] for position in group] for group in found]


def test_copies_in_another_size_or_quality_or_with_a_watermark_are_one_group(tmp_path):
    image = scene(0)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", compress_level=1)
    image.save(tmp_path / "c.jpg", quality=70)
    image.resize((90, 90)).save(tmp_path / "d.png")
    watermarked(image).save(tmp_path / "e.png")
    for seed in range(1, 30):
        scene(seed).save(tmp_path / f"other{seed}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert groups_of(tmp_path) == [["a.png", "b.png", "c.jpg", "d.png", "e.png"]]


def test_two_objects_on_white_are_two_images(tmp_path):
    for number, colour in enumerate(((200, 30, 30), (30, 30, 200), (20, 120, 20))):
        image = Image.new("RGB", (160, 160), "white")
        ImageDraw.Draw(image).ellipse((60, 60, 60 + 30 + 8 * number, 100), fill=colour)
        image.save(tmp_path / f"{number}.png")
    assert groups_of(tmp_path) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_split_keeps_them_on_one_side(tmp_path, seed):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(12):
            image = scene(100 * label + number)
            image.save(tmp_path / name / f"{number}.png")
            if number < 6:
                watermarked(image).save(tmp_path / name / f"{number}_marked.png")
    apart = {}
    for grouped in (False, True):
        data = Folder(tmp_path, img_size=16, test_fraction=0.25, val_fraction=0.25, group_duplicates=grouped, seed=seed)
        data.setup("fit")
        data.setup("test")
        split_of = {path: split for split, paths in data.split().items() for path in paths}
        assert len(split_of) == 36
        apart[grouped] = sum(
            split_of[f"{name}/{number}.png"] != split_of[f"{name}/{number}_marked.png"]
            for name in ("cat", "dog")
            for number in range(6)
        )
        assert min(len(dataset) for dataset in data.datasets().values()) >= 2
    assert apart[True] == 0
    assert apart[False] > 0


@pytest.mark.parametrize("burst", [2, 3, 5])
def test_bursts_are_held_out_as_a_whole(tmp_path, burst, monkeypatch):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(60):
            scene(100 * label + number // burst).save(tmp_path / name / f"{number:02}.png")
    data = Folder(tmp_path, img_size=16, val_fraction=0.2, group_duplicates=True)
    data.setup("fit")
    split = data.split()
    for name in ("cat", "dog"):
        held_out = [int(path[4:6]) for path in split["val"] if path.startswith(name)]
        assert len(held_out) == 12 // burst * burst
        assert not {number // burst for number in held_out} & {
            int(path[4:6]) // burst for path in split["train"] if path.startswith(name)
        }
    monkeypatch.setattr("gn_transfer.data.hold_out.MOST_COMPARED", 120)
    data.setup("fit")
    monkeypatch.setattr("gn_transfer.data.hold_out.MOST_COMPARED", 100)
    with pytest.raises(ConfigError, match=r"data\.group_duplicates compares at most 100 images, and here are 120"):
        data.setup("fit")


def test_images_that_all_show_the_same_leave_none_for_validation(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            scene(len(name) + ord(name[0])).save(tmp_path / name / f"{number}.png")
    with pytest.raises(ConfigError, match=r"no image is left for validation\. Images that show the same stay together"):
        Folder(tmp_path, img_size=16, group_duplicates=True).setup("fit")


@pytest.mark.skipif("GN_TRANSFER_TEST_DATA" not in os.environ, reason="needs the real images")
def test_the_watermarked_abyssinian():
    images = Path(os.environ["GN_TRANSFER_TEST_DATA"]) / "pets5" / "oxford-iiit-pet" / "images"
    listed = [LabeledImage(path.name, 0) for path in sorted(images.glob("Abyssinian_*.jpg"))]
    found = [{listed[position].path for position in group} for group in group_duplicates(images, listed)]
    assert {"Abyssinian_151.jpg", "Abyssinian_99.jpg"} in found
    assert sum(map(len, found)) < 20
