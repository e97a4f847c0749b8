"""Digits: scikit-learn's, written once; one channel for a net that takes one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from gn_transfer.__main__ import main
from gn_transfer.config import ConfigError
from gn_transfer.data import Digits
from gn_transfer.data import digits as digits_module
from gn_transfer.data.decode import decode_image


def test_the_embedded_digits(tmp_path: Path) -> None:
    data = Digits(tmp_path, batch_size=3)
    data.channels = 1
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.classes == [str(digit) for digit in range(10)]
    sizes = {split: len(dataset) for split, dataset in data.datasets().items()}
    assert sum(sizes.values()) == 1797
    assert sizes["test"] == 299
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (3, 1, 28, 28)
    colour = Digits(tmp_path)
    colour.setup("validate")
    assert colour.val_dataset[0][0].shape == (3, 28, 28)


def test_evaluation_sees_every_pixel_of_a_digit(tmp_path: Path) -> None:
    data = Digits(tmp_path)
    data.channels = 1
    data.prepare_data()
    data.setup("validate")
    for index in (0, 100):
        whole = decode_image(tmp_path / "sklearn" / data.val_dataset.images[index].path)
        assert whole.shape == (32, 32, 3)
        np.testing.assert_array_equal(data.val_dataset[index][0][0].numpy(), whole[2:30, 2:30, 0])


def test_they_are_written_once_and_are_the_right_ones(tmp_path: Path) -> None:
    Digits(tmp_path).prepare_data()
    stamp = (tmp_path / "sklearn" / "digits.json").stat().st_mtime_ns
    Digits(tmp_path).prepare_data()
    assert (tmp_path / "sklearn" / "digits.json").stat().st_mtime_ns == stamp
    counts = [
        sum(1 for split in ("train", "test") for _ in (tmp_path / "sklearn" / split / str(digit)).iterdir())
        for digit in range(10)
    ]
    assert counts == np.bincount(load_digits().target).tolist()


def test_something_else_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="holds something else than these digits"):
        Digits(tmp_path).prepare_data()


def test_mnist_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    with pytest.raises(ConfigError, match=r"data\.source=mnist: MNIST could not be downloaded .* data\.source=sklearn"):
        Digits(tmp_path, source="mnist").prepare_data()


def test_mnist_is_written_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    parts = {split: (images, [number % 10 for number in range(20)]) for split in ("train", "test")}
    monkeypatch.setattr(digits_module, "_mnist", lambda folder: parts)
    data = Digits(tmp_path, source="mnist", val_fraction=0.5)
    data.channels = 1
    data.prepare_data()
    data.setup("test")
    order = [int(Path(image.path).stem) for image in data.test_dataset.images]
    for place, number in enumerate(order):
        np.testing.assert_array_equal(data.test_dataset[place][0][0].numpy(), images[number])


@pytest.mark.parametrize("norm", ["gn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("none", "bn"))])
def test_the_small_net_trains_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], norm: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--data", "Digits", "--model.backbone", "cnn_mnist", "--model.norm", norm, "--model.num_groups", "8"]
    words += ["--data.batch_size", "32", "--optimizer.name", "adam", "--trainer.max_epochs", "1"]
    assert main(["fit", *words, "--optimizer.lr", "0.003", "--mixed_precision.mode", "fp32"]) == 0
    assert main(["validate", "--ckpt_path", "last"]) == 0
    accuracy = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("val/acc1"))
    assert float(accuracy.split()[1]) > 0.7  # chance is 0.10
