"""The user's own images, in both layouts, and what may be wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gn_transfer.config import ConfigError
from gn_transfer.data import Folder


@pytest.fixture
def split_root(tmp_path: Path, write_image: Any) -> Path:
    """Train, valid and test folders of two classes."""
    for split, count in (("train", 4), ("valid", 2), ("test", 3)):
        for name in ("cat", "dog"):
            for number in range(count):
                write_image(tmp_path / "own" / split / name / f"{split}{number}.jpg", seed=number)
    return tmp_path / "own"


def fit(root: Path, **options: Any) -> Folder:
    data = Folder(root, **{"img_size": 32, "num_workers": 0, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def test_class_folders_at_the_top(folder_root: Path) -> None:
    data = fit(folder_root, val_fraction=0.25)
    assert data.classes == ["apple", "pear"]
    assert data.class_counts(data.train_dataset.images) == {"apple": 6, "pear": 3}
    assert data.class_counts(data.val_dataset.images) == {"apple": 2, "pear": 1}
    assert all(path.startswith(("apple/", "pear/")) for path in data.split()["train"])


def test_given_splits_are_kept(split_root: Path) -> None:
    data = fit(split_root)
    data.setup("test")
    assert {split: len(paths) for split, paths in data.split().items()} == {"train": 8, "val": 4, "test": 6}
    assert all(path.startswith("valid/") for path in data.split()["val"])


def test_validation_is_cut_from_train_where_it_has_no_folder(split_root: Path) -> None:
    (split_root / "valid").rename(split_root / "unused")
    data = fit(split_root, val_fraction=0.5)
    assert data.class_counts(data.train_dataset.images) == {"cat": 2, "dog": 2}
    assert data.class_counts(data.val_dataset.images) == {"cat": 2, "dog": 2}


def test_every_seed_has_the_same_test_split_and_its_own_validation_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    tests, vals = [], []
    for seed in range(4):
        data = fit(tmp_path, val_fraction=0.25, test_fraction=0.25, seed=seed)
        tests.append([image.path for image in data.list_test()])
        vals.append(data.val_dataset.paths)
        assert not set(tests[-1]) & {*data.val_dataset.paths, *data.train_dataset.paths}
    assert len(tests[0]) == 10
    assert tests[1:] == tests[:-1]
    assert vals[0] != vals[1]


def test_test_fraction_is_held_out_from_fit(folder_root: Path) -> None:
    data = fit(folder_root, val_fraction=0.25, test_fraction=0.25)
    data.setup("test")
    split = data.split()
    assert len(split["test"]) == 3
    assert len({path for paths in split.values() for path in paths}) == 12
    with pytest.raises(ConfigError, match=r"data\.test_fraction=1\.5 is out of range"):
        fit(folder_root, test_fraction=1.5)


def test_no_test_images(folder_root: Path) -> None:
    with pytest.raises(ConfigError, match=r"no test images.*data\.test_fraction"):
        Folder(folder_root).setup("test")


def test_a_test_folder_without_a_train_folder_is_no_class(folder_root: Path, write_image: Any) -> None:
    write_image(folder_root / "test" / "apple" / "0.jpg")
    with pytest.raises(ConfigError, match=r"test holds class folders, but there is no .*train; move the class folders"):
        Folder(folder_root).setup("fit")


def test_a_class_called_train(folder_root: Path) -> None:
    (folder_root / "apple").rename(folder_root / "train")
    assert fit(folder_root).classes == ["pear", "train"]


def test_what_is_no_image_is_left_alone(folder_root: Path, write_image: Any) -> None:
    (folder_root / "apple" / "notes.txt").write_text("not an image")
    (folder_root / "apple" / "._0.jpg").write_bytes(b"resource fork")
    (folder_root / ".cache").mkdir()
    write_image(folder_root / "apple" / "more" / "deep.JPG")
    data = fit(folder_root)
    assert (
        sum(data.class_counts(data.train_dataset.images).values())
        + sum(data.class_counts(data.val_dataset.images).values())
        == 13
    )
    assert any("apple/more/deep.JPG" in paths for paths in data.split().values())


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root=.*nowhere: no such folder"):
        fit(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no class folders\. A classifier needs at least 2 classes"):
        fit(tmp_path)


def test_one_class_only(folder_root: Path) -> None:
    (folder_root / "pear").rename(folder_root.parent / "pear")
    with pytest.raises(ConfigError, match=r"only one class folder \(apple\)"):
        fit(folder_root)


def test_class_folder_without_images(folder_root: Path) -> None:
    (folder_root / "quince").mkdir()
    (folder_root / "quince" / "readme.md").write_text("soon")
    with pytest.raises(ConfigError, match=r"quince: no images \(.*\.bmp, \.gif, .*there: 1 not an image \(\.md\)"):
        fit(folder_root)


def test_classes_that_differ_between_splits(split_root: Path) -> None:
    (split_root / "valid" / "dog").rename(split_root / "valid" / "bird")
    with pytest.raises(
        ConfigError, match=r"valid: its class folders are not those of train; missing: dog; not in train: bird"
    ):
        fit(split_root)


def test_two_validation_folders(split_root: Path, write_image: Any) -> None:
    write_image(split_root / "val" / "cat" / "0.jpg")
    with pytest.raises(ConfigError, match="val and valid; keep one of them"):
        fit(split_root)


def test_a_class_with_one_image(folder_root: Path, write_image: Any) -> None:
    write_image(folder_root / "quince" / "only.jpg")
    with pytest.raises(ConfigError, match=r"class of quince/only\.jpg has 1 image"):
        fit(folder_root)


def test_skipping_may_not_empty_a_class(folder_root: Path) -> None:
    for path in (folder_root / "pear").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match="no training image of pear"):
        fit(folder_root, on_bad_image="skip")
