"""What data check finds, on files corrupt on purpose and on real ones."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_transfer.data.check import CheckResult, check_images
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import describe_file
from gn_transfer.data.pets_counts import BREEDS, OFFICIAL, compare_counts

CLASSES = ["cat", "dog"]


@pytest.fixture
def root(tmp_path: Path, write_image: Any) -> Path:
    for number in range(8):
        write_image(tmp_path / f"{number}.jpg", seed=number, size=(90, 120))
    return tmp_path


def check(
    root: Path, train: list[str], test: list[str], *, skips_bad: bool = False, beside: list[str] | None = None
) -> CheckResult:
    splits = {
        "train": [LabeledImage(name, position % 2) for position, name in enumerate(train)],
        "test": [LabeledImage(name, position % 2) for position, name in enumerate(test)],
    }
    if beside:
        splits["unlisted"] = [LabeledImage(name, 0) for name in beside]
    return check_images(root, splits, CLASSES, skips_bad=skips_bad, threads=2)


def names(*numbers: int) -> list[str]:
    return [f"{number}.jpg" for number in numbers]


def test_sound_images(root: Path) -> None:
    report = check(root, names(0, 1, 2, 3), names(4, 5))
    assert (report.problems, report.warnings, report.duplicates, report.near_duplicates) == ([], [], [], [])
    facts = report.as_dict()
    assert facts["images"] == 6
    assert facts["class_counts"] == {"train": {"cat": 2, "dog": 2}, "test": {"cat": 1, "dog": 1}}
    assert facts["formats"] == {"JPEG": 6}
    assert facts["short_side"] == {"least": 90, "median": 90, "greatest": 90}


def spoil_scan(data: bytes) -> bytes:
    middle = len(data) * 2 // 3
    return data[:middle] + bytes([0x55, 0xFF, 0xD3, 0x81] * 12) + data[middle + 48 :]


DAMAGE = {
    "empty": lambda data: b"",
    "text": lambda data: b"<html>404</html>",
    "cut": lambda data: data[: len(data) // 2],
    "header": lambda data: data[:2] + bytes(200) + data[202:],
    "no tables": lambda data: data[: data.index(b"\xff\xdb")] + data[data.index(b"\xff\xc0") :],
}


@pytest.mark.parametrize("kind", list(DAMAGE))
@pytest.mark.parametrize("split", ["train", "test"])
def test_damage_that_stops_a_training(root: Path, kind: str, split: str) -> None:
    victim = root / ("2.jpg" if split == "train" else "4.jpg")
    victim.write_bytes(DAMAGE[kind](victim.read_bytes()))
    report = check(root, names(0, 1, 2, 3), names(4, 5))
    [found] = report.unreadable
    assert (found.path, found.split) == (victim.name, split)
    assert found.error
    assert report.problems == [
        "1 file cannot be decoded; repair or remove, or leave out with --data.on_bad_image skip."
    ]
    assert check(root, names(0, 1, 2, 3), names(4, 5), skips_bad=True).problems == []


def test_faulty_data_that_decodes_all_the_same(root: Path) -> None:
    victim = root / "1.jpg"
    victim.write_bytes(spoil_scan(victim.read_bytes()))
    [found] = check(root, names(0, 1, 2, 3), names(4, 5)).suspicious
    assert found.path == "1.jpg"
    assert found.warning.startswith("faulty JPEG data")


def test_a_missing_file_and_a_class_without_any(root: Path) -> None:
    (root / "1.jpg").unlink()
    report = check(root, names(0, 1, 2), names(4))
    assert [file.error for file in report.unreadable] == ["no such file"]
    assert "no sound training image of dog." in report.problems


def test_a_name_that_lies(root: Path) -> None:
    Image.new("RGBA", (90, 70), (200, 10, 10, 128)).save(root / "1.jpg", "PNG")
    [found] = check(root, names(0, 1, 2, 3), names(4)).suspicious
    assert (found.format, found.mode, found.warning) == ("PNG", "RGBA", "a PNG by content")


def test_the_same_image_in_two_splits_and_under_two_classes(root: Path) -> None:
    (root / "4.jpg").write_bytes((root / "0.jpg").read_bytes() + b"trailing bytes")  # the same pixels, other bytes
    (root / "3.jpg").write_bytes((root / "2.jpg").read_bytes())
    report = check(root, names(0, 1, 2, 3), names(4, 5))
    assert [[file.path for file in group] for group in report.duplicates] == [names(0, 4), names(2, 3)]
    assert [[file.path for file in group] for group in report.leaks] == [names(0, 4)]
    assert "1 image under more than one class." in report.warnings
    assert any("1 images are in two splits, exactly or nearly (1 in" in warning for warning in report.warnings)
    assert report.problems == []


def test_a_resized_copy_in_another_split(root: Path) -> None:
    with Image.open(root / "0.jpg") as image:
        image.resize((200, 150), Image.Resampling.BICUBIC).save(root / "5.jpg", quality=60)
    report = check(root, names(0, 1, 2, 3), names(4, 5))
    [(one, other, apart)] = report.near_duplicates
    assert {one.path, other.path} == {"0.jpg", "5.jpg"}
    assert apart < 2.5
    assert len(report.leaks) == 1


def test_flat_and_tiny_images_are_not_taken_for_copies(root: Path) -> None:
    for number, grey in enumerate((100, 101)):
        Image.new("RGB", (90, 90), (grey,) * 3).save(root / f"{number}.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    for number, quality in ((2, 90), (3, 80)):
        Image.fromarray(noise).save(root / f"{number}.jpg", quality=quality)
    assert check(root, names(0, 1, 2, 3), names(4)).near_duplicates == []


def test_what_lies_beside_is_named_and_stops_nothing(root: Path) -> None:
    (root / "7.jpg").write_bytes(b"")
    report = check(root, names(0, 1, 2, 3), names(4), beside=names(6, 7))
    assert report.problems == []
    assert [file.path for file in report.unreadable] == ["7.jpg"]
    assert report.warnings == ["2 images are in no split: 6.jpg, 7.jpg."]


def test_a_image_behind_a_image_is_a_jpeg(tmp_path: Path, write_image: Any) -> None:
    path = write_image(tmp_path / "a.jpg")
    with Image.open(path) as image:
        image.save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[image])
    assert describe_file(tmp_path / "two.jpg") == ("JPEG", "RGB", "")


def test_the_official_counts() -> None:
    assert len(BREEDS) == len(set(BREEDS)) == 37
    assert {split: sum(counts.values()) for split, counts in OFFICIAL.items()} == {"trainval": 3680, "test": 3669}


def test_the_official_counts_are_those_of_the_published_lists(real_data: Path) -> None:
    found: dict[str, dict[str, int]] = {"trainval": {}, "test": {}}
    with (real_data / "pets_official_split.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["split"]][row["breed"]] = found[row["split"]].get(row["breed"], 0) + 1
    for split, counts in found.items():
        assert OFFICIAL[split] == counts
        assert compare_counts(split, counts) == []
        counts["pug"] -= 1
        assert compare_counts(split, counts) == [f"{split}: 99 images of pug, officially 100"]


def test_pets5_has_leaks_that_are_really_there(real_data: Path) -> None:
    images = real_data / "pets5" / "oxford-iiit-pet" / "images"
    numbers = {"train": (150, 179, 180, 100), "test": (3, 19, 20, 1)}
    splits = {
        split: [LabeledImage(f"german_shorthaired_{number}.jpg", 0) for number in some]
        for split, some in numbers.items()
    }
    report = check_images(images, splits, ["german_shorthaired", "other"], skips_bad=False, threads=2)
    leaks = {tuple(sorted(file.path for file in group)) for group in report.leaks}
    assert leaks == {
        ("german_shorthaired_150.jpg", "german_shorthaired_3.jpg"),
        ("german_shorthaired_179.jpg", "german_shorthaired_19.jpg"),
        ("german_shorthaired_180.jpg", "german_shorthaired_20.jpg"),
    }
