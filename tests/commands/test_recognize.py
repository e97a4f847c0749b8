"""``fit PATH`` and ``test PATH``: what is found, what is chosen, and what the user may overrule."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_transfer.__main__ import main
from gn_transfer.backbones import hub, packages
from gn_transfer.commands.arguments import Arguments
from gn_transfer.commands.recognize import recognize
from gn_transfer.config import ConfigError


def images(root: Path, *folders: str, number: int = 10) -> None:
    generator = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for index in range(number):
            pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "answers", lambda: False)
    monkeypatch.setattr(hub, "in_cache", lambda repository: False)
    monkeypatch.setattr(packages, "find_file", lambda architecture: None)


def value(options: list[str], key: str) -> str | None:
    return options[options.index(key) + 1] if key in options else None


def test_a_folder_of_class_folders(tmp_path):
    images(tmp_path, "my photos/cat", "my photos/dog")
    found = recognize(Path("my photos"))
    assert value(found.options, "--data.root") == "my photos"
    assert value(found.options, "--data.test_fraction") == "0.2"
    assert value(found.options, "--model.backbone") == "resnetv2_18"
    assert value(found.options, "--accumulation.effective_batch_size") == "8"
    assert found.remarks[0] == "images by class in my photos: 2 classes, 20 images"
    assert found.remarks[1] == (
        "held out, stratified by class: 20% for the test, 20% of the rest for validation; images that show the same "
        "stay on one side"
    )
    assert "because the Hugging Face hub does not answer" in found.remarks[2]


def test_the_larger_weights_where_they_can_be_had(tmp_path, monkeypatch):
    images(tmp_path, "train/cat", "train/dog", "Test/cat", "Test/dog")
    found = recognize(tmp_path, hub_answers=True)
    assert "--model.backbone" not in found.options  # that of folder.yaml: ResNetV2-50
    assert "--data.test_fraction" not in found.options
    assert "90 MB from the Hugging Face hub" in found.remarks[2]
    monkeypatch.setattr(hub, "in_cache", lambda repository: True)
    assert "in the cache" in recognize(tmp_path, hub_answers=False).remarks[2]


def test_imagenet_weights_from_a_package_where_there_is_no_hub(tmp_path, monkeypatch):
    images(tmp_path, "photos/cat", "photos/dog")
    monkeypatch.setattr(packages, "find_file", Path)
    found = recognize(Path("photos"))
    assert value(found.options, "--model.backbone") == "tf_efficientnet_lite0"
    assert value(found.options, "--model.norm") == "bn_frozen"
    assert value(found.options, "--data.img_size") == "224"
    assert "gn-transfer[imagenet]" in found.remarks[2]
    assert value(recognize(Path("photos"), hub_answers=True).options, "--model.backbone") is None


@pytest.mark.parametrize(("side", "crop"), [(300, None), (150, "128"), (40, "64")])
def test_small_images_with_masks_have_small_crops(tmp_path, monkeypatch, side, crop):
    monkeypatch.setattr(packages, "find_file", lambda architecture: Path("weights"))
    for kind in ("images", "masks"):
        (tmp_path / "own" / kind).mkdir(parents=True)
        for number in range(3):
            pixels = np.zeros((side, side + 20, *((3,) if kind == "images" else ())), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / kind / f"{number}.png")
    found = recognize(tmp_path / "own", hub_answers=False)
    sizes = [found.options[place + 1] for place, word in enumerate(found.options) if word == "--data.img_size"]
    assert sizes == (["256"] if crop is None else ["256", crop])
    assert any("px, since the short side" in remark for remark in found.remarks) == (crop is not None)


def test_oxford_pets(pets_root):
    found = recognize(pets_root, hub_answers=False)
    assert found.options[:4] == ["--config", "pets_gnws.yaml", "--data.root", str(pets_root)]
    assert "Oxford-IIIT Pet" in found.remarks[0]


@pytest.mark.parametrize("number", [3, 300])
def test_fewer_images_have_more_epochs(tmp_path, number):
    images(tmp_path, "photos/cat", "photos/dog", number=number)
    options = recognize(Path("photos")).options
    assert value(options, "--trainer.max_epochs") == {3: "30", 300: "10"}[number]
    assert value(options, "--accumulation.effective_batch_size") == {3: "8", 300: "16"}[number]


def test_what_is_refused(tmp_path, capsys):
    Path("file.jpg").write_bytes(b"x")
    for path, message in (("nowhere", "no such folder"), ("file.jpg", "is a file"), (".", "no class folders")):
        with pytest.raises(ConfigError, match=message):
            recognize(Path(path))
    images(tmp_path, "photos/cat", "photos/dog")
    assert main(["fit", "photos", "--data.root", "other"]) == 2
    assert "the path says what --data.root says" in capsys.readouterr().err
    assert main(["test", "photos"]) == 2
    assert "was trained on photos; train one: gn-transfer fit photos" in capsys.readouterr().err
    assert not Path("photos/oxford-iiit-pet").exists()


@pytest.mark.slow  # the documentation goes the same way in every run of the tests
def test_from_a_folder_to_a_tested_model(tmp_path, capsys):
    images(tmp_path, "my photos/cat", "my photos/dog")
    assert main(["data", "check", "my photos"]) == 0
    short = ["--trainer.max_epochs", "1", "--data.img_size", "32", "--data.cache", "none", "--model.pretrained", "null"]
    assert main(["fit", "my photos", *short]) == 0
    output = capsys.readouterr().out
    command = next(line for line in output.splitlines() if "as: gn-transfer" in line).partition("as: ")[2]
    words = shlex.split(command)[1:]
    assert main([*words, "--dry_run"]) == 0  # what it prints can be pasted
    assert "your own options count instead of --model.backbone" not in output
    assert "your own options count instead of --data.img_size 64, --trainer.max_epochs 30" in output
    assert "test 4 (held back)" in output
    assert "next       gn-transfer test checkpoints/my_photos/gn_ws-bs1-seed0/best.ckpt" in output
    for target in ("my photos", "runs/my_photos/gn_ws-bs1-seed0", "checkpoints/my_photos/gn_ws-bs1-seed0"):
        assert main(["test", target]) == 0
    assert main(["validate", "checkpoints/my_photos/gn_ws-bs1-seed0/last.ckpt"]) == 0
    assert main(["report", "my photos"]) == 0
    assert Path("runs/my_photos/gn_ws-bs1-seed0/report.html").is_file()
    assert main(["export", "my photos", "--output", "bundle"]) == 0
    assert main(["fit", "my photos", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert re.search(r"continuing \S*runs/my_photos/gn_ws-bs1-seed0\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit"], "no images are named: give their folder, gn-transfer fit PHOTOS"),
        (["data", "check"], "no images are named"),
        (["fit", "my", "photos"], "put a path with spaces in quotes: 'my photos'"),
        (["fit", "PHOTOS", "--trainer.max_epoch", "3"], "did you mean 'trainer.max_epochs'?"),
        (["fit", "PHOTOS", "--trainer.max_epochs", "0"], "nothing would be trained"),
        (["fit", "PHOTOS", "--data.img_size", "5000000", "--data.cache", "none"], "do not fit into memory"),
        (["fit", "PHOTOS", "--trainer.max_epochs", "three"], "use null or a whole number"),
        (["fit", "PHOTOS", "--model.norm", "GroupNorm"], "did you mean 'gn'?"),
        (["fit", "PHOTOS", "--model.norm", "batch_norm"], "did you mean 'bn'?"),
        (["test", "photos/cat/0.png"], "cannot be read as a checkpoint"),
    ],
)
def test_what_beginners_type(tmp_path, capsys, words, said):
    images(tmp_path, "photos/cat", "photos/dog")
    words = ["photos" if word == "PHOTOS" else word for word in words]
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data_sample").exists()


def test_a_name_for_the_runs(tmp_path):
    images(tmp_path, "photos/cat", "photos/dog")
    for words in (["photos", "--name", "trial"], ["--name=trial", "--config", "folder.yaml"]):
        arguments = Arguments("fit", words)
        assert arguments.config_name == "trial"
        assert not any("trial" in word or word == "" for word in arguments.argv)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--epochs", "trainer.max_epochs"),
        ("--lr", "optimizer.lr"),
        ("--norm", "model.norm"),
        ("--batch-size", "data.batch_size"),
        ("--optimizer.learning_rate", "optimizer.lr"),
        ("--accumulate_grad_batches", "accumulation.effective_batch_size"),
        ("--resume", "ckpt_path"),
    ],
)
def test_the_names_of_other_programs_lead_to_ours(capsys, typed, meant):
    assert main(["fit", typed, "1"]) == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_help_is_one_screen(capsys, command):
    assert main([command, "--help"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert len(short) <= 40
    assert max(map(len, short)) <= 120


def test_help_all_lists_every_option(capsys):
    assert main(["fit", "--help_all"]) == 0
    text = capsys.readouterr().out
    assert "--regularization.mixup" in text
    assert "--trainer.limit_val_batches" in text
