"""Tiny-ImageNet in its own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gn_transfer.config import ConfigError
from gn_transfer.data import TinyImageNet

WNIDS = ["n02", "n01", "n03"]


@pytest.fixture
def tiny(tmp_path: Path, write_image: Any) -> Path:
    base = tmp_path / "tiny-imagenet-200"
    for number, wnid in enumerate(sorted(WNIDS)):
        for image in range(4):
            write_image(base / "train" / wnid / "images" / f"{wnid}_{image}.JPEG", seed=10 * number + image)
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        write_image(base / "val" / "images" / f"val_{number}.JPEG", seed=number)
    (base / "wnids.txt").write_text("\n".join(WNIDS))
    (base / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane\nn03\tegg, ovum\nn99\tother\n")
    (base / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{number}.JPEG\t{wnid}\t0\t0\t9\t9\n" for number, wnid in enumerate(sorted(WNIDS)))
    )
    return tmp_path


@pytest.mark.parametrize("inside", [True, False])
def test_layout(tiny: Path, inside: bool) -> None:
    data = TinyImageNet(tiny / "tiny-imagenet-200" if inside else tiny, batch_size=2)
    data.setup("fit")
    assert data.classes == ["crane (n02)", "crane (n01)", "egg"]  # in the order of wnids.txt
    for dataset, number in ((data.train_dataset, 4), (data.val_dataset, 1)):
        assert data.class_counts(dataset.images) == dict.fromkeys(data.classes, number)
    assert {image.target for image in data.train_dataset.images if "/n01/" in image.path} == {1}
    assert [image.target for image in data.val_dataset.images] == [1, 0, 2]
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 64, 64)


def test_without_words(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200" / "words.txt").unlink()
    data = TinyImageNet(tiny)
    data.setup("validate")
    assert data.classes == WNIDS


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("wnids.txt", "n01\nn01\n", r"wnids\.txt: n01 stands there twice"),
        ("wnids.txt", "n01", r"wnids\.txt: fewer than two ids"),
        ("val/val_annotations.txt", "val_0.JPEG n01", r"val_annotations\.txt:1: .* is not a line"),
        ("val/val_annotations.txt", "val_0.JPEG\tn77\t0", r"val_annotations\.txt:1"),
        ("val/val_annotations.txt", "../x.JPEG\tn01\t0", r"val_annotations\.txt:1"),
        ("val/val_annotations.txt", "", "is empty"),
        ("wnids.txt", "n01\nn55", "no .*JPEG there"),
    ],
)
def test_what_is_not_as_it_should_be(tiny: Path, file: str, content: str, message: str) -> None:
    (tiny / "tiny-imagenet-200" / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        TinyImageNet(tiny).setup("fit")


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Tiny-ImageNet there\. Unpack"):
        TinyImageNet(tmp_path).setup("fit")


def test_there_is_no_test_split(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="no labelled test images; use gn-transfer validate"):
        TinyImageNet(tiny).setup("test")
