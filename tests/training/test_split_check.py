"""No figure on images that were trained on; a resumed run keeps its split."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from gn_transfer.__main__ import main
from gn_transfer.training.split_check import _near_duplicates, check_split

BEST = "checkpoints/default/gn_ws-bs1-seed0/best.ckpt"


def write_images(root: str, seed: int, side: int) -> None:
    """Two classes of ten images; the size of the files depends on the side."""
    generator = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        Path(root, name).mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{root}/{name}/{number}.png")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run on photos/, two classes of ten images."""
    monkeypatch.chdir(tmp_path)
    write_images("photos", seed=0, side=20)
    arguments = ["fit", "--data", "Folder", "--data.root", "photos", "--data.img_size", "16", "--data.cache", "none"]
    arguments += ["--model.backbone", "resnetv2_18", "--trainer.max_epochs", "1", "--data.test_fraction", "0.2"]
    assert main(arguments) == 0
    return tmp_path


def refusal(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 2
    return capsys.readouterr().err


def test_honest_figures_are_given(trained, capsys):
    assert main(["validate", "--ckpt_path", BEST]) == 0
    assert main(["test", "--ckpt_path", BEST]) == 0
    assert "note" not in capsys.readouterr().out
    shutil.move("photos", "moved")
    assert main(["test", "--ckpt_path", BEST, "--data.root", "moved"]) == 0


def test_another_test_fraction_is_refused(trained, capsys):
    error = refusal(capsys, "test", "--ckpt_path", BEST, "--data.test_fraction", "0.5")
    assert "of the 10 test images are among the images that this run was trained on, and" in error
    assert "data.test_fraction is 0.2 in the run and 0.5 here. Leave these options out" in error
    assert "test/acc1" not in Path("runs/default/gn_ws-bs1-seed0/metrics.json").read_text()


def test_another_seed_is_refused(trained, capsys):
    error = refusal(capsys, "validate", "--ckpt_path", BEST, "--seed_everything", "5")
    assert "are among the images that this run was trained on" in error
    assert "seed_everything is 0 in the run and 5 here" in error


def test_other_images_of_the_same_names_are_welcome(trained, capsys):
    write_images("others", seed=1, side=24)
    assert main(["validate", "--ckpt_path", BEST, "--data.root", "others"]) == 0
    assert "other images than the run was validated on; none of them was trained on" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_split(trained, capsys):
    Path("photos/cat/00.png").write_bytes(Path("photos/cat/9.png").read_bytes())
    last = str(Path(BEST).with_name("last.ckpt"))
    error = refusal(capsys, "fit", "--ckpt_path", last, "--trainer.max_epochs", "2")
    assert "files were added, moved or changed since" in error
    Path("photos/cat/00.png").unlink()
    assert main(["fit", "--ckpt_path", last, "--trainer.max_epochs", "2"]) == 0


def test_copies_of_training_images_under_other_names_are_reported(trained, capsys):
    write_images("more", seed=2, side=30)
    for name in ("cat", "dog"):
        for number in range(8):
            Path(f"more/{name}/{number}.png").unlink()
    copied = next(iter(json.loads(Path("runs/default/gn_ws-bs1-seed0/split.json").read_text())["train"]))
    shutil.copy(Path("photos", copied), "more/dog/renamed.png")
    Path("both/train").mkdir(parents=True)
    shutil.copytree("more", "both/train", dirs_exist_ok=True)
    shutil.copytree("more", "both/test")
    capsys.readouterr()
    assert main(["test", "--ckpt_path", BEST, "--data.root", "both"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Exact copies of training images among the test images: 1 of 5 (test/dog/renamed.png = {copied})" in said


def test_images_that_the_weights_were_trained_on_are_named(trained, capsys):
    arguments = ["fit", "--data", "Folder", "--data.root", "photos", "--data.img_size", "16", "--data.cache", "none"]
    arguments += ["--model.backbone", "resnetv2_18", "--data.test_fraction", "0.2", "--model.pretrained", BEST]
    capsys.readouterr()
    assert main([*arguments, "--dry_run"]) == 0
    assert "are among those that model.pretrained" not in capsys.readouterr().out  # the same seed, the same split
    assert main([*arguments, "--seed_everything", "1", "--dry_run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        rf"\d of the 4 validation images are among those that model\.pretrained={BEST} was trained on", said
    )


def test_a_test_of_some_images_is_not_recorded(trained, capsys, monkeypatch):
    monkeypatch.setattr("gn_transfer.data.datamodule.EVAL_BATCH_SIZE", 2)
    before = Path("runs/default/gn_ws-bs1-seed0/metrics.json").read_text()
    assert main(["test", "--ckpt_path", BEST, "--trainer.limit_test_batches", "1"]) == 0
    assert "only 2 images were tested, so the run keeps its record as it is" in capsys.readouterr().out
    assert Path("runs/default/gn_ws-bs1-seed0/metrics.json").read_text() == before


def test_a_copy_in_validation_is_reported_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images("photos/train", seed=0, side=20)
    write_images("photos/val", seed=1, side=20)
    write_images("photos/test", seed=2, side=20)
    shutil.copy("photos/train/cat/3.png", "photos/val/dog/7.png")
    arguments = ["fit", "--data", "Folder", "--data.root", "photos", "--data.img_size", "16", "--data.cache", "none"]
    arguments += ["--model.backbone", "resnetv2_18", "--data.group_duplicates", "true", "--dry_run"]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Exact copies of training images among the val images: 1 of 20 (val/dog/7.png = train/cat/3.png)" in said


def test_near_duplicates_of_training_images_are_reported_where_they_are_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, split in enumerate(("train", "val", "test")):
        write_images(f"photos/{split}", seed=number, side=20)
    photo = cv2.resize(np.random.default_rng(9).integers(0, 256, (8, 8, 3), dtype=np.uint8), (96, 96))
    cv2.imwrite("photos/train/cat/photo.jpg", photo)
    cv2.imwrite("photos/val/cat/smaller.jpg", cv2.resize(photo, (80, 80)))
    cv2.imwrite("photos/test/cat/again.jpg", cv2.resize(photo, (88, 88)))
    arguments = ["fit", "--data", "Folder", "--data.root", "photos", "--data.img_size", "16", "--data.cache", "none"]
    arguments += ["--model.backbone", "resnetv2_18", "--trainer.max_epochs", "1"]
    assert main([*arguments, "--dry_run"]) == 0
    assert "Near-duplicates" not in capsys.readouterr().out
    assert main([*arguments, "--data.group_duplicates", "true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Near-duplicates of training images among the val images: 1 of 21 (val/cat/smaller.jpg ~ train/cat" in said
    assert main(["test", "--ckpt_path", BEST]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Near-duplicates of training images among the test images: 1 of 21 (test/cat/again.jpg ~ train/cat" in said


def test_validation_on_copies_in_another_folder_is_reported(trained, capsys):
    for path in map(Path, json.loads(Path("runs/default/gn_ws-bs1-seed0/split.json").read_text())["train"]):
        Path("copy", path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(Path("photos", path), Path("copy", path.parent, f"again_{path.name}"))
    capsys.readouterr()
    assert main(["validate", "--ckpt_path", BEST, "--data.root", "copy", "--data.test_fraction", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "none of them was trained on" not in said
    assert "Exact copies of training images" in said


def test_a_validation_image_that_has_changed_is_refused(trained, capsys):
    path = json.loads(Path("runs/default/gn_ws-bs1-seed0/split.json").read_text())["val"][0]
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(f"photos/{path}")
    error = refusal(capsys, "validate", "--ckpt_path", BEST)
    assert "other ones than those of the run: 4 here and 4 there, 3 of them the same" in error


@pytest.mark.parametrize("split", [None, {}, {"train": {}}, {"val": {}}])
def test_a_checkpoint_that_does_not_know_its_split(split):
    [said] = check_split({"split": split}, None, "test")
    assert "does not say which images it was trained on" in said


def test_near_duplicates_are_those_of_training_images(tmp_path, monkeypatch):
    """Of the images a to f, the first two were trained on."""
    data = SimpleNamespace(root=tmp_path, split=lambda: {"val": ["c", "d", "e", "f"]})
    for groups, found in (([[0, 2], [3, 4]], {"c": "a"}), ([[2, 4], [1, 3, 5]], {"d": "b", "f": "b"})):
        monkeypatch.setattr("gn_transfer.training.split_check.group_duplicates", lambda *_, groups=groups: groups)
        assert _near_duplicates(data, "val", tmp_path, ["a", "b"]) == found
    assert _near_duplicates(data, "val", tmp_path / "elsewhere", ["a", "b"]) == {}


def test_a_run_goes_on_with_its_own_training_images_only(trained, capsys):
    """The validation images are the same: they have a folder of their own."""
    write_images("own/train", seed=0, side=20)
    write_images("own/val", seed=1, side=20)
    words = ["fit", "--data", "Folder", "--data.root", "own", "--data.img_size", "16", "--data.cache", "none"]
    words += ["--model.backbone", "resnetv2_18", "--trainer.max_epochs", "1", "--name", "own"]
    assert main(words) == 0
    Image.new("RGB", (20, 20), "red").save("own/train/cat/new.png")
    error = refusal(capsys, *words, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    assert "the training images are other ones than those of the run: 21 here and 20 there, 20 of them" in error
    assert "start a new run with model.pretrained=CHECKPOINT" in error
    Path("own/train/cat/new.png").unlink()
    assert main([*words, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
