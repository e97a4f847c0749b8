"""Segmentation on the command line: a run from images to a test figure, checks of masks, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from fabricate import fabricate
from PIL import Image

from gn_transfer.__main__ import main
from gn_transfer.commands.recognize import recognize
from gn_transfer.commands.training_cli import parsed
from gn_transfer.commands.training_keys import DATA
from gn_transfer.data import SegmentationDataModule

SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "3"]
SMALL = ["--model.backbone", "resnetv2_18", "--data.img_size", "32", "--data.cache", "none", "--model.decoder", "fpn"]


def write_pairs(root):
    """Ten images of 56 x 40 pixels, the left part ground, the right part cat."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(10):
        generator = np.random.default_rng(number)
        mask = np.zeros((40, 56), np.uint8)
        mask[:, 20 + number :] = 1
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
        pixels = generator.integers(0, 90, (40, 56, 3), np.uint8) + 120 * mask[..., None]
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    (root / "classes.txt").write_text("ground\ncat\n")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_pairs(tmp_path / "own")


def fit(folder, *more):
    return main(["fit", "--config", "segmentation_folder.yaml", "--data.root", str(folder), *SMALL, *SHORT, *more])


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_images_to_a_test_figure(folder, work, capsys):
    assert fit(folder, "--data.test_fraction", "0.2", "--model.pretrained", "null") == 0
    out = capsys.readouterr().out
    assert "reached    best val/miou 0." in out
    assert "gn-transfer export" in out
    assert "gn-transfer report" in out
    assert "ground 4" in out
    [run] = (work / "runs" / "segmentation_folder").iterdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["segmentation"] == {"loss": "both"}
    assert "regularization" not in config
    assert (run / "training_images.jpg").is_file()
    [best] = (work / "checkpoints" / "segmentation_folder").glob("*/best.ckpt")
    assert main(["test", str(best)]) == 0
    assert "test/miou" in capsys.readouterr().out
    recorded = (run / "metrics.json").read_text()
    assert "test/miou" in json.loads(recorded)
    assert main(["test", str(best), "--data.short_side", "48"]) == 0
    assert "other sizes than the run's (data.short_side is 32 in the run and 48 here)" in capsys.readouterr().out
    assert (run / "metrics.json").read_text() == recorded
    shutil.copytree(folder, work / "copy")
    assert main(["test", str(best), "--data.root", str(work / "copy")]) == 0
    assert "recorded   in" in capsys.readouterr().out  # the same images in another place
    assert (run / "worst_images.jpg").is_file()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "The mean IoU on the validation images is " in page
    assert page.count("data:image/jpeg;base64,") == 2 + 2  # the two sheets, and the images with the lowest IoU
    assert "<td>ground</td>" in page
    last = best.with_name("last.ckpt")
    assert main(["fit", "--ckpt_path", str(last), "--trainer.max_epochs", "2"]) == 0
    assert "epoch 2/2" in capsys.readouterr().out


def test_a_folder_of_pairs_is_recognized(folder):
    found = recognize(folder, hub_answers=True)
    assert found.options[:2] == ["--config", "segmentation_folder.yaml"]
    assert "--data.test_fraction" in found.options
    assert "images with masks" in found.remarks[0]
    assert "224 px" not in " ".join(found.remarks)
    for kind in ("images", "masks"):
        for split in ("train", "val", "test"):
            (folder / split / kind).mkdir(parents=True)
        (folder / kind).rename(folder / "train" / kind)
    assert "--data.test_fraction" not in recognize(folder, hub_answers=True).options


def test_the_default_decoder_is_written_out(folder, work):
    with parsed("fit", ["--data", "SegmentationFolder", "--data.root", str(folder)], builds=False) as cli:
        assert cli.plain_config()["model"]["decoder"] == "unet"
    with parsed("fit", ["--data", "Folder", "--data.root", str(folder)], builds=False) as cli:
        assert cli.plain_config()["model"]["decoder"] is None


def test_checking_masks(folder, work, capsys):
    arguments = ["data", "check", "--config", "segmentation_folder.yaml", "--data.root", str(folder), *SMALL]
    assert main(arguments) == 0
    assert "of the pixels" in capsys.readouterr().out
    Image.fromarray(np.full((40, 56), 9, np.uint8)).save(folder / "masks" / "3.png")
    Image.fromarray(np.full((40, 56), 255, np.uint8)).save(folder / "masks" / "4.png")
    assert main([*arguments, "--format", "json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [bad["path"] for bad in report["bad_masks"]] == ["masks/3.png"]
    assert any("1 masks have no labeled pixel" in warning for warning in report["warnings"])
    assert any("1 masks cannot be used" in problem for problem in report["problems"])


def test_showing_and_caching_pairs(folder, work, capsys):
    arguments = ["--config", "segmentation_folder.yaml", "--data.root", str(folder), "--data.img_size", "32"]
    assert main(["data", "show", "--output", "sheet.png", *arguments]) == 0
    with Image.open("sheet.png") as sheet:
        assert sheet.size[0] > 100
    assert main(["data", "cache", "--data.cache_dir", str(work / "kept"), *arguments]) == 0
    assert "masks there" in capsys.readouterr().out
    assert {path.parent.parent.name.partition("-")[0] for path in Path("kept").glob("*/*/*/*.px")} == {"whole", "mask"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regularization.mixup", "0.2"], "regularization.* are keys of classification"),
        (["--model.decoder_norm", "bn_frozen"], "no statistics to freeze"),
        (["--data.img_size", "50"], "not a multiple of 32"),
        (["--model.decoder", "upernet", "--model.norm", "bn"], "model.decoder=upernet"),
        (["--model.decoder", "pspnet"], "pspnet"),
    ],
)
def test_refused_with_exit_2(folder, work, capsys, options, message):
    assert fit(folder, "--model.pretrained", "null", *options) == 2
    assert message in capsys.readouterr().err
    assert not (work / "runs").exists()


def test_keys_of_segmentation_are_refused_for_images_by_class(work, capsys):
    for options, message in (
        (["--segmentation.loss", "dice"], "segmentation.* are keys of segmentation"),
        (["--model.decoder", "unet"], "model.decoder=unet is for segmentation"),
    ):
        assert main(["fit", "--config", "sample_gnws.yaml", *SHORT, *options]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of two decoder norms, two seeds each, with a choice of the learning rate before and a test at the end."""
    root = tmp_path_factory.mktemp("study")
    write_pairs(root / "own")
    (root / "study.yaml").write_text(
        "base: segmentation_folder.yaml\nsamples: 4\nset: {model.norm: bn_frozen, model.backbone: resnetv2_18, "
        "model.pretrained: null, model.decoder: fpn, data.img_size: 32, data.cache: none, data.test_fraction: 0.2, "
        "accumulation.effective_batch_size: 2}\ngrid: {model.decoder_norm: [gn, none]}\n"
        "select: {key: optimizer.lr, values: [0.001, 0.01], seeds: 1, extend: 0}\nseeds: 2\ntest: last\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["sweep", "--config", "study.yaml", "--data.root", "own"]) == 0
    return root


def test_a_study_of_segmentations(studied, monkeypatch, capsys):
    monkeypatch.chdir(studied)
    report = json.loads((studied / "runs" / "study" / "report" / "report.json").read_text())
    assert report["metric"] == "test/miou"
    assert "mIoU on the test split" in report["metric_note"]
    assert {group["decoder_norm"] for group in report["groups"]} == {"gn", "none"}
    assert all(group["low"] <= group["mean"] <= group["high"] for group in report["groups"])
    assert any("chosen by mean val/miou" in note for note in report["notes"])
    page = (studied / "runs" / "study" / "report" / "index.html").read_text()
    assert "the mean IoU of the image over its runs" in page
    assert "IoU of " in page
    assert main(["compare", "runs/study", "--metric", "val/miou"]) == 0
    assert "Compared by val/miou: mIoU on validation" in capsys.readouterr().out
    assert main(["compare", "runs/study", "--metric", "val/acc1"]) == 2
    assert "--metric val/acc1 is not one to compare by; " in capsys.readouterr().err


def test_data_modules_of_segmentation_are_named_so():
    """A study tells its task by the name, without importing torch."""
    assert all(issubclass(kind, SegmentationDataModule) == ("Segmentation" in kind.__name__) for kind in DATA)


def test_runs_of_two_tasks_are_not_compared(studied, monkeypatch, capsys):
    monkeypatch.chdir(studied)
    fabricate(studied / "other", seed=0)
    assert main(["compare", "runs/study", "other", "--force"]) == 2
    assert "some runs classify images and others segment them" in capsys.readouterr().err
