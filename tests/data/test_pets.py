"""The Oxford layout, with any number of breeds, and what happens where it is missing."""

from __future__ import annotations

import csv
import time
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torchvision.datasets

from gn_transfer.config import ConfigError
from gn_transfer.data import Pets
from gn_transfer.data import pets as pets_module
from gn_transfer.data.pets import read_annotations


def test_official_splits_and_class_order(pets_root: Path) -> None:
    data = Pets(pets_root)
    data.setup("fit")
    data.setup("test")
    assert data.classes == ["Abyssinian", "american_bulldog", "Maine_Coon"]  # by class id
    assert data.num_classes == 3
    split = data.split()
    assert len(split["train"]) + len(split["val"]) == 30
    assert split["test"] == [
        f"oxford-iiit-pet/images/{breed}_{number}.jpg" for breed in data.classes for number in (11, 12)
    ]
    assert data.class_counts(data.val_dataset.images) == {"Abyssinian": 2, "american_bulldog": 2, "Maine_Coon": 2}
    assert all(data.classes[image.target] in image.path for image in data.val_dataset.images)


def test_root_may_be_the_folder_itself(pets_root: Path) -> None:
    inside, above = Pets(pets_root / "oxford-iiit-pet"), Pets(pets_root)
    inside.setup("fit")
    above.setup("fit")
    assert [f"oxford-iiit-pet/{path}" for path in inside.split()["val"]] == above.split()["val"]


def test_class_ids_with_gaps_and_comments(pets_root: Path) -> None:
    path = pets_root / "oxford-iiit-pet" / "annotations" / "trainval.txt"
    path.write_text("#Image CLASS-ID SPECIES BREED ID\n" + path.read_text().replace("Coon_1 3", "Coon_1 3"))
    for name in ("trainval.txt", "test.txt"):
        listing = path.with_name(name)
        listing.write_text(
            "\n".join(line for line in listing.read_text().splitlines() if "american" not in line) + "\n\n"
        )
    data = Pets(pets_root)
    data.setup("fit")
    data.setup("test")
    assert data.classes == ["Abyssinian", "Maine_Coon"]
    assert {image.target for image in data.test_dataset.images} == {0, 1}


def test_missing_root_names_path_and_remedy(tmp_path: Path) -> None:
    data = Pets(tmp_path / "nowhere")
    data.prepare_data()
    with pytest.raises(ConfigError, match=r"data\.root=.*nowhere: no Oxford.*--data\.download true.*trainval\.txt"):
        data.setup("fit")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trainval.txt: lists no images"),
        ("Abyssinian_1 one 1 1", r"trainval\.txt:1: 'Abyssinian_1 one 1 1' is not a line 'image_id class_id"),
        ("# header\nAbyssinian", r"trainval\.txt:2: 'Abyssinian'"),
        ("../../secret_1 1 1 1", "is not a line"),
        ("Abyssinian_1 \u00b2 1 1", "is not a line"),
        ("Abyssinian_1 1 1 1", r"trainval\.txt: only one class \(Abyssinian\)"),
        ("Abyssinian_1 1 1 1\nBengal_1 1 1 1", r"Bengal_1 has class id 1, which is Abyssinian"),
    ],
)
def test_broken_annotations(pets_root: Path, text: str, message: str) -> None:
    (pets_root / "oxford-iiit-pet" / "annotations" / "trainval.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Pets(pets_root).setup("fit")


def test_test_list_with_an_unknown_breed(pets_root: Path) -> None:
    path = pets_root / "oxford-iiit-pet" / "annotations" / "test.txt"
    path.write_text(path.read_text() + "Sphynx_1 9 1 9\n")
    with pytest.raises(ConfigError, match=r"Sphynx does not occur in trainval\.txt"):
        Pets(pets_root).setup("test")


def test_no_test_list(pets_root: Path) -> None:
    (pets_root / "oxford-iiit-pet" / "annotations" / "test.txt").unlink()
    Pets(pets_root).setup("fit")
    with pytest.raises(ConfigError, match=r"test\.txt: cannot be read"):
        Pets(pets_root).setup("test")


class FakeDownload:
    """Stands for torchvision's class: writes the layout, or fails half-way."""

    _RESOURCES = torchvision.datasets.OxfordIIITPet._RESOURCES

    def __init__(self, root: str, download: bool) -> None:
        assert download
        base = Path(root) / "oxford-iiit-pet"
        (base / "images").mkdir(parents=True)
        (base / "images.tar.gz").write_bytes(b"archive")
        if self.fails:
            raise RuntimeError("File not found or corrupted.")
        (base / "annotations").mkdir()
        (base / "annotations" / "trainval.txt").write_text("a_1 1 1 1\nb_1 2 1 2\n")

    fails = False


def test_download_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", FakeDownload)
    monkeypatch.setattr(pets_module, "_check_reachable", lambda url, root: None)
    root = tmp_path / "a" / "data"
    Pets(root, download=True).prepare_data()
    assert sorted(path.name for path in (root / "oxford-iiit-pet").iterdir()) == ["annotations", "images"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", None)  # what is there is not fetched again
    Pets(root, download=True).prepare_data()


def test_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", FakeDownload)
    monkeypatch.setattr(FakeDownload, "fails", True)
    monkeypatch.setattr(pets_module, "_check_reachable", lambda url, root: None)
    with pytest.raises(ConfigError, match=r"images\.tar\.gz failed \(File not found or corrupted\.\).*unpack images"):
        Pets(tmp_path / "data", download=True).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_download_does_not_mix_with_what_is_there(pets_root: Path) -> None:
    (pets_root / "oxford-iiit-pet" / "annotations" / "trainval.txt").unlink()
    with pytest.raises(ConfigError, match=r"oxford-iiit-pet is there, but without images or annotations/trainval\.txt"):
        Pets(pets_root, download=True).prepare_data()


@pytest.mark.parametrize("hangs", [False, True])
def test_download_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        if hangs:
            time.sleep(2)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(pets_module.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(pets_module, "_PROBE_SECONDS", -0.8)  # + 1 s of grace
    started = time.monotonic()
    with pytest.raises(ConfigError, match="no answer within" if hangs else "no route"):
        Pets(tmp_path / "data", download=True).prepare_data()
    assert time.monotonic() - started < 1.0
    assert list(tmp_path.iterdir()) == []


def test_pets5(real_data: Path) -> None:
    data = Pets(real_data / "pets5")
    data.setup("fit")
    data.setup("test")
    assert data.classes == ["Abyssinian", "american_bulldog", "Bengal", "german_shorthaired", "Maine_Coon"]
    sizes = {split: len(paths) for split, paths in data.split().items()}
    assert sizes == {"train": 400, "val": 100, "test": 498}


def test_pets5_has_the_official_split(real_data: Path) -> None:
    with (real_data / "pets_official_split.csv").open() as file:
        official = {row["image"]: row["split"] for row in csv.DictReader(file)}
    assert Counter(official.values()) == {"trainval": 3680, "test": 3669}
    for split in ("trainval", "test"):
        listed = read_annotations(real_data / "pets5" / "oxford-iiit-pet" / "annotations" / f"{split}.txt")
        assert {official[annotation.image_id] for annotation in listed} == {split}
