"""What a folder of images may look like: sixty arrangements are read right or refused with a remedy."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_transfer.config import ConfigError
from gn_transfer.data import Folder
from gn_transfer.data.decode import SUFFIXES, BadImageError, decode_image
from gn_transfer.data.layout import SPLITS, count_files, find_layout


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in SUFFIXES:
            Image.new("RGB", (8, 8), (len(name) * 7 % 256, 0, 0)).save(path)
        else:
            path.write_bytes(b"x")


def fill(root: Path, *folders: str, number: int = 4, suffix: str = ".png") -> None:
    for folder in folders:
        put(root, *(f"{folder}/{index}{suffix}" for index in range(number)))


@pytest.mark.parametrize("spelled", [str.lower, str.upper, str.title])
@pytest.mark.parametrize(
    ("train", "val", "test"), list(itertools.zip_longest(*SPLITS.values(), fillvalue="val"))[:4], ids=str
)
def test_split_folders_in_any_case_and_by_their_common_names(tmp_path, spelled, train, val, test):
    names = {"train": spelled(train), "val": spelled(val), "test": spelled(test)}
    for name in names.values():
        fill(tmp_path, f"{name}/cat", f"{name}/dog")
    layout = find_layout(tmp_path)
    assert {split: folder.name for split, folder in layout.splits.items()} == names
    assert layout.classes == ["cat", "dog"]
    data = Folder(tmp_path, img_size=8)
    data.setup("fit")
    data.setup("test")
    assert {split: len(dataset) for split, dataset in data.datasets().items()} == {"train": 8, "val": 8, "test": 8}
    assert count_files(layout).describe() == "24 used, none ignored"


@pytest.mark.parametrize("present", [("train",), ("train", "val"), ("train", "test")])
def test_missing_splits_are_cut_from_the_rest(tmp_path, present):
    for split in present:
        fill(tmp_path, f"{split}/cat", f"{split}/dog")
    data = Folder(tmp_path, img_size=8, test_fraction=0.25)
    data.setup("fit")
    assert len(data.train_dataset) == 8 - ("val" not in present) * 2 - ("test" not in present) * 2
    assert set(data.list_test()).isdisjoint(data.train_dataset.images)


@pytest.mark.parametrize(
    "classes", [("cat", "dog"), ("Katze", "Hündin"), ("猫", "犬"), ("train", "bus"), ("test", "exam")]
)
@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp", ".TIF"])
def test_class_folders_of_any_name_and_format(tmp_path, classes, suffix):
    fill(tmp_path, *classes, suffix=suffix)
    assert find_layout(tmp_path).classes == sorted(classes)
    assert count_files(find_layout(tmp_path)).used == 8


@pytest.mark.parametrize(
    ("folders", "classes", "splits"),
    [
        (["Train/cat", "Train/dog", "val/cat", "val/dog", "TEST/cat", "TEST/dog"], ["cat", "dog"], 3),
        (["a b ", "c.d", "-e", "f\ng"], ["-e", "a b ", "c.d", "f\ng"], 1),
        (["cat/2025/05", "cat/2026", "dog"], ["cat", "dog"], 1),
        (["train/x/x", "train/y", "test/x", "test/y"], ["x", "y"], 2),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_odd_but_clear_folders_also_behind_a_link(tmp_path, folders, classes, splits, linked):
    fill(tmp_path / "real", *folders)
    root = tmp_path / "real"
    if linked:
        root = tmp_path / "link"
        root.symlink_to(tmp_path / "real")
    layout = find_layout(root)
    assert (layout.classes, len(layout.splits)) == (classes, splits)
    assert count_files(layout).used == 4 * len(folders)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda root: None, "no class folders"),
        (lambda root: put(root, "1.png", "2.png"), "no class folders"),
        (lambda root: fill(root, "cat"), "only one class folder"),
        (lambda root: fill(root, "photos/cat", "photos/dog"), r"Its own folders look like classes: give .*photos"),
        (lambda root: fill(root, "train/cat", "train/dog", "tset/cat", "tset/dog"), "the folder tset .* is it test"),
        (lambda root: fill(root, "train/cat", "train/dog", "Validaton/cat", "Validaton/dog"), "is it val"),
        (lambda root: fill(root, "tarin/cat", "tarin/dog", "val/cat", "val/dog"), "the folder tarin .* is it train"),
        (lambda root: fill(root, "test/cat", "test/dog"), "there is no .*train"),
        (lambda root: fill(root, "train/a", "train/b", "val/a", "val/b", "valid/a", "valid/b"), "keep one of them"),
        (lambda root: fill(root, "train/a", "train/b", "TRAIN/a", "TRAIN/b"), "keep one of them"),
        (lambda root: fill(root, "train/a", "train/b", "val/a"), "missing: b"),
        (lambda root: fill(root, "train/a", "train/b", "val/A", "val/b"), "missing: a; not in train: A"),
        (lambda root: (fill(root, "a"), (root / "b").mkdir()), "b: no images .* it is empty"),
        (lambda root: (fill(root, "a"), put(root, "b/x.mp4")), r"there: 1 not an image \(\.mp4\)"),
        (lambda root: (fill(root, "a"), put(root, "b/.x.png")), "there: 1 hidden"),
        (lambda root: fill(root, "a", "b", number=1), "needs at least 2"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(tmp_path, make, remedy):
    make(tmp_path)
    with pytest.raises(ConfigError, match=remedy):
        Folder(tmp_path, img_size=8).setup("fit")


def test_every_file_is_accounted_for(tmp_path):
    fill(tmp_path, "train/cat", "train/dog/puppies", "test/cat", "test/dog")
    put(tmp_path, "README.md", "train/notes.txt", "train/cat/.hidden.png", "train/cat/film.mp4", "extra/1.png")
    put(tmp_path, ".git/x.png", "__MACOSX/cat/1.png", "top.png", "train/dog/none")
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    fill(outside, "more", number=3)
    (tmp_path / "train" / "cow").symlink_to(outside / "more")
    (tmp_path / "test" / "cow").symlink_to(outside / "more")
    (tmp_path / "train" / "cat" / "loop").symlink_to(tmp_path)
    os.link(tmp_path / "train" / "cat" / "0.png", tmp_path / "train" / "cat" / "hard.png")
    (tmp_path / "train" / "cat" / "link.png").symlink_to(outside / "more" / "0.png")
    (tmp_path / "train" / "cat" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "train" / "cat" / "circle.png").symlink_to("circle.png")
    (tmp_path / "train" / "circle").symlink_to("circle")
    (tmp_path / "train" / "cat" / "device.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    data = Folder(tmp_path, img_size=8)
    counted = data.count_files()
    used = {image.path for image in [*data.list_fit().train, *data.list_test()]}
    assert counted.used == len(used) == 24
    assert {reason: len(files) for reason, files in counted.ignored.items()} == {
        "hidden": 3,
        "broken link": 3,
        "pipe or device": 2,
        "link to a folder, not followed": 1,
        "beside the class folders": 1,
        "in extra/, which is no split": 1,
        "not an image (.md)": 1,
        "not an image (.txt)": 1,
        "not an image (.mp4)": 1,
        "not an image (no ending)": 1,
    }
    assert "24 used, 15 ignored: 1 beside the class folders, 3 broken link" in counted.describe()


@pytest.mark.parametrize("suffix", [".avif", ".heic"])
def test_images_of_phones_are_read_where_a_library_reads_them(tmp_path, suffix):
    if suffix not in SUFFIXES:
        pytest.skip("the library is not installed")
    if suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / f"photo{suffix}", quality=95)
    pixels = decode_image(tmp_path / f"photo{suffix}")
    assert pixels.shape == (30, 40, 3)
    assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - (200, 30, 30)).max() < 8


def test_a_program_is_not_started_by_an_image(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(BadImageError, match="not an image"):
        decode_image(tmp_path / "holiday.jpg")
