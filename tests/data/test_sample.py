"""The embedded sample: the same bytes for the same seed, quick, whole, and hard enough for a linear classifier."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from gn_transfer.config import ConfigError
from gn_transfer.data import Sample, decode_image
from gn_transfer.data import sample as sample_module
from gn_transfer.data.dataset import ImageDataset
from gn_transfer.data.sample import TEST_PER_BREED, TRAINVAL_PER_BREED, write_sample
from gn_transfer.data.synthetic_animals import BREEDS, render_animal


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, float]]:
    """The whole sample, and the processor time it took on one core."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    root = tmp_path_factory.mktemp("sample")
    started = time.process_time()
    write_sample(root)
    yield root, time.process_time() - started
    cv2.setNumThreads(threads)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images per breed."""
    monkeypatch.setattr(sample_module, "TRAINVAL_PER_BREED", 1)
    monkeypatch.setattr(sample_module, "TEST_PER_BREED", 1)


def test_written_in_seconds_on_one_core(written: tuple[Path, float]) -> None:
    assert written[1] < 15.0  # 3 with AVX-512, 6 on an older CPU


def test_layout_is_that_of_pets(written: tuple[Path, float]) -> None:
    data = Sample(written[0], img_size=64, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.classes == [breed.name for breed in BREEDS]
    sizes = {split: len(paths) for split, paths in data.split().items()}
    assert sizes["train"] + sizes["val"] == len(BREEDS) * TRAINVAL_PER_BREED
    assert sizes["test"] == len(BREEDS) * TEST_PER_BREED
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (1, 3, 64, 64)
    annotations = written[0] / "oxford-iiit-pet" / "annotations"
    listing = annotations.joinpath("list.txt").read_text().splitlines()
    assert listing[0] == "#Image CLASS-ID SPECIES BREED ID"
    lines = annotations.joinpath("trainval.txt").read_text() + annotations.joinpath("test.txt").read_text()
    assert sorted(listing[6:]) == sorted(lines.splitlines())
    assert [path.name for path in written[0].iterdir()] == ["oxford-iiit-pet"]


def test_same_seed_same_bytes(tmp_path: Path, few: None) -> None:
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b")
    write_sample(tmp_path / "c", seed=1)
    first = digest(tmp_path / "a")
    assert len(first) == 4 * len(BREEDS) + 4  # images and trimaps
    assert digest(tmp_path / "b") == first
    changed = {path for path, value in digest(tmp_path / "c").items() if first[path] != value}
    assert len(changed) == 4 * len(BREEDS) + 1  # all images, trimaps and the stamp


def test_written_once_and_again_for_another_version(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_sample(tmp_path)
    stamp = place / "sample.json"
    inode = stamp.stat().st_ino
    write_sample(tmp_path)
    assert stamp.stat().st_ino == inode
    monkeypatch.setattr(sample_module, "_VERSION", 99)
    write_sample(tmp_path)
    assert json.loads(stamp.read_text())["version"] == 99
    assert [path.name for path in tmp_path.iterdir()] == ["oxford-iiit-pet"]


def test_interrupted_drawing_leaves_nothing(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_module, "render_animal", fail)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_run_may_be_first(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write = sample_module._write

    def write_while_another_finishes(folder: Path, seed: int) -> None:
        write(folder, seed)
        monkeypatch.setattr(sample_module, "_write", write)
        if not (tmp_path / "oxford-iiit-pet").exists():
            write_sample(tmp_path)

    monkeypatch.setattr(sample_module, "_write", write_while_another_finishes)
    write_sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["oxford-iiit-pet"]


def test_other_peoples_images_are_not_replaced(pets_root: Path) -> None:
    before = digest(pets_root)
    with pytest.raises(ConfigError, match="holds something else than the sample"):
        Sample(pets_root).prepare_data()
    assert digest(pets_root) == before


def test_nothing_is_written_among_images_of_the_user(folder_root: Path) -> None:
    before = digest(folder_root)
    with pytest.raises(ConfigError, match=r"holds other files.*--data Folder"):
        Sample(folder_root).prepare_data()
    assert digest(folder_root) == before


def test_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"data\.root=.*file: the sample cannot be written there"):
        Sample(tmp_path / "file").prepare_data()


def test_images_of_a_breed_differ() -> None:
    rng = np.random.default_rng(0)
    for breed in BREEDS:
        one, other = render_animal(breed, 48, rng)[0], render_animal(breed, 48, rng)[0]
        assert one.shape == (48, 48, 3)
        assert one.std() > 15
        assert np.abs(one.astype(int) - other).mean() > 15


def flat_pixels(root: Path, dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """32 x 32 RGB pixels in 0-1, one row per image, and the targets."""
    rows = [
        cv2.resize(decode_image(root / image.path), (32, 32), interpolation=cv2.INTER_AREA).ravel() / 255
        for image in dataset.images
    ]
    return np.stack(rows), np.array([image.target for image in dataset.images])


def test_a_linear_classifier_on_pixels_stays_under_half(written: tuple[Path, float]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    data = Sample(written[0])
    data.setup("fit")
    pixels, targets = flat_pixels(written[0], data.train_dataset)
    val_pixels, val_targets = flat_pixels(written[0], data.val_dataset)
    mean, deviation = pixels.mean(0), pixels.std(0)
    pixels, val_pixels = (pixels - mean) / deviation, (val_pixels - mean) / deviation
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):  # products this small lose time on more threads
        # The 520 images span no more than 520 of the 3,072 directions. An L2 penalty never leaves them: turning the
        # axes into them changes no prediction and saves most of the time.
        axes = np.linalg.svd(pixels, full_matrices=False)[2].T
        for inverse_penalty in (1e-3, 1e-2):
            classifier = linear_model.LogisticRegression(C=inverse_penalty, max_iter=300)
            classifier.fit(pixels @ axes, targets)
            assert classifier.score(pixels @ axes, targets) > 0.7  # it does learn
            assert classifier.score(val_pixels @ axes, val_targets) < 0.5
